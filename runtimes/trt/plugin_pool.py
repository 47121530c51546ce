"""``gemma3c::SigLIPPool`` as a plugin: patches averaged in squares, and the RMSNorm after it.

Legend: N images, P patches, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from runtimes.trt.plugin_base import FieldKind, KernelPlugin


class SigLIPPoolPlugin(KernelPlugin):
    """Attributes: ``pool``, patches along an edge of a square; ``eps`` of the norm; ``kernels``, the hash of their file."""

    pool: int
    eps: float

    NAME: ClassVar[str] = "SigLIPPool"
    FIELDS: ClassVar[Mapping[str, FieldKind]] = {"pool": "int", "eps": "float"}
    INPUTS: ClassVar[tuple[tuple[str, str], ...]] = (("x", "bf16"), ("scale", "fp32"))  # [N, P, H] and [H]
    OUTPUTS: ClassVar[tuple[tuple[str, str], ...]] = (("y", "bf16"),)  # [N, P / pool**2, H]
    KERNELS: ClassVar[tuple[str, ...]] = ("siglip_pool",)

    def values(self, shapes: Sequence[Sequence[int]]) -> dict[str, int | float]:
        return {"N": shapes[0][0], "eps": self.eps}

    def paths(self, values: Mapping[str, int | float]) -> tuple[str, ...]:
        return self.KERNELS

    def addresses(self, inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, int]:
        return {"x": inputs[0], "scale": inputs[1], "y": outputs[0]}

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        x = inputs[0]
        out = self._trt.DimsExprs(x)
        square = builder.constant(self.pool**2)
        out[1] = builder.operation(self._trt.DimensionOperation.FLOOR_DIV, x[1], square)
        return [out]
