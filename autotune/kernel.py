"""What a tunable kernel is: its search space, the cases a model step runs, its oracle, and what a case costs.

The study, the records, the profile, the ahead-of-time check, the benches and the tests know kernels through this
class only, so a new kernel is one file and one line in :mod:`autotune.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from autotune.gpu import Gpu
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes

Stage = Literal["prefill", "decode", "vision"]
Tensors = dict[str, Tensor]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape to run: ``dtype`` names what the weights or activations are (``bfloat16``, ``int8``, ``int4``)."""

    dtype: str
    dims: Mapping[str, int]

    def __str__(self) -> str:
        return " ".join([self.dtype, *(f"{name}={value}" for name, value in self.dims.items())])


@dataclass(frozen=True, kw_only=True)
class Use:
    """A case that one step of a model runs ``count`` times; ``name`` says where: ``local attention``."""

    name: str
    case: Case
    count: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """A point of a search space: constexpr values, and how Triton compiles."""

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        values = [f"{name}={value}" for name, value in self.constants.items()]
        return " ".join([*values, f"warps={self.num_warps}", f"stages={self.num_stages}"])


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least a case can do: bytes that must cross the GPU's memory bus, and floating-point operations."""

    bytes: float
    flops: float

    def floor_s(self, gpu: Gpu) -> float:
        """Seconds below which no version runs: the larger of both terms."""
        return max(self.bytes / gpu.read_bytes_per_s, self.flops / gpu.bf16_flops)


@dataclass(frozen=True, kw_only=True)
class Space:
    """A search space: each constexpr's values, in ascending order, then warps and stages."""

    constants: Mapping[str, tuple[int, ...]]
    num_warps: tuple[int, ...]
    num_stages: tuple[int, ...]


class Kernel(ABC):
    """A tunable kernel. One instance a kernel, without state."""

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    stages: ClassVar[tuple[Stage, ...]]
    source: ClassVar[tuple[str, ...]]
    """Modules whose text decides the result: their hash keys the records."""

    @abstractmethod
    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        """Cases that one step of ``model`` runs; empty where the stage does without this kernel.

        ``context``: decode, positions before the token; prefill, tokens of the chunk (from an empty cache); vision, nothing.
        """

    @abstractmethod
    def bucket(self, case: Case) -> str:
        """The shape bucket: cases of one bucket share a tuned configuration."""

    @abstractmethod
    def space(self, case: Case) -> Space:
        """Every configuration that may be tried, whether or not it fits a GPU."""

    @abstractmethod
    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        """Why the configuration cannot run there (shared memory, registers, threads), known without compiling."""

    @abstractmethod
    def default(self, case: Case, gpu: Gpu) -> Config:
        """The heuristic where nothing is recorded; it fits every GPU from compute capability 8.0."""

    @abstractmethod
    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        """Random inputs of fitting magnitude. On ``meta`` only shapes."""

    @abstractmethod
    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        """What the launches write: outputs, and workspaces whose names begin with ``_``. In-place outputs are inputs.

        Workspaces named ``_zero...`` are counters: zeros before the launches, and zeros again after them.
        """

    @abstractmethod
    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        """The launches over ``inputs | outputs``, in order."""

    @abstractmethod
    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        """Outputs by torch, computed in the floating dtype of ``inputs``; new tensors, the inputs stay as they are."""

    def in_place(self, case: Case) -> frozenset[str]:
        """The inputs that the launches write.

        Found from the oracle's shapes alone; a kernel whose oracle reads values names them itself.
        """
        inputs = self.inputs(case, device="meta")
        return frozenset(self.oracle(case, inputs).keys() & inputs.keys())

    @abstractmethod
    def cost(self, case: Case) -> Cost:
        """The least bytes and operations."""

    def run(self, case: Case, config: Config, inputs: Tensors) -> Tensors:
        """Runs all launches on fresh outputs; returns them without the workspaces."""
        device = next(iter(inputs.values())).device
        written = self.outputs(case, config, device=device)
        for launch in self.launches(case, config, inputs | written):
            launch.run()
        return {name: tensor for name, tensor in written.items() if not name.startswith("_")}
