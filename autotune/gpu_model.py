"""What tells GPU models apart, and how near they are to each other. Without torch: ``gemma3c doctor`` asks too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autotune.gpu import Gpu


@dataclass(frozen=True, kw_only=True)
class GpuModel:
    """A GPU model by name, with what decides whose records stand in where it has none."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int

    @classmethod
    def of(cls, gpu: Gpu) -> GpuModel:
        return cls(name=gpu.name, compute_capability=gpu.compute_capability, multiprocessors=gpu.multiprocessors)

    def is_similar(self, other: GpuModel) -> bool:
        """Whether the records of the other may stand in: it has the same major compute capability."""
        return self.compute_capability[0] == other.compute_capability[0]

    def distance(self, other: GpuModel) -> tuple[bool, int, int, str]:
        """Less is nearer, and nothing is nearer than the same model."""
        return (
            other.name != self.name,
            abs(other.multiprocessors - self.multiprocessors),
            abs(other.compute_capability[1] - self.compute_capability[1]),
            other.name if other.name != self.name else "",
        )
