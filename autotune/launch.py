"""One launch of a Triton function: what runs, on which arguments, and how it is compiled.

A kernel describes its work as a list of these. The same list is run by the just-in-time compiler or by
Triton's interpreter (:meth:`Launch.run`), compiled ahead of time for a GPU that is not there (made from meta
tensors), and recorded by the ``cuda`` target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

Argument = Tensor | int | float
Constant = int | float | bool | str | None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch.

    Args:
        function: the ``@triton.jit`` function.
        grid: programs along x, y and z.
        arguments: run-time arguments by the function's own names: tensors (a pointer), ints and floats.
        constants: every ``tl.constexpr`` argument; None where an optional tensor is left out.
        num_warps, num_stages: as Triton has them.
        max_registers: a limit for each thread, None for the compiler's own choice.
        dependent: it may begin before the launch ahead of it ends; the function has the constant ``DEPENDENT`` and
            waits by itself (:mod:`autotune.kernels.dependent`). From compute capability 9.0.
    """

    function: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Argument]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    dependent: bool = False

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides the constants."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        if self.dependent:
            options["launch_pdl"] = True
        return options

    def run(self) -> None:
        """Launches on the current CUDA stream, or in Triton's interpreter, where nothing runs at the same time."""
        triton.set_allocator(_scratch)
        constants = dict(self.constants)
        if self.dependent and knobs.runtime.interpret:
            constants["DEPENDENT"] = False
        self.function[self.grid](**self.arguments, **constants, **self.options)


def _scratch(size_bytes: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for tensor descriptors that a kernel makes on the device; torch aligns it to 512 bytes."""
    return torch.empty(size_bytes, dtype=torch.int8, device="cuda")
