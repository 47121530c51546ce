"""What the products for Hopper use of Gluon beyond :mod:`tests.autotune.kernels.gluon_emulation`, in the same manner.

A copy to global memory reads its rows some time after it was issued; a thread that announces or copies rows which it
stored has to fence them first; a product may go on with the sums of another that is still under way.
"""

from __future__ import annotations

import random
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autotune.launch import Launch
from tests.autotune.kernels import gluon_emulation as emulation
from tests.autotune.kernels.gluon_emulation import Barrier, Descriptor, Pointer, Shared

_HERE = emulation._HERE
_LONGEST_S = 1e-3


def run_emulated(launch: Launch) -> None:
    """Runs a launch of a Gluon function on CPU tensors."""
    function = launch.function.fn
    run = _namespace(function.__module__, {})[function.__name__]
    arguments = {k: Pointer(v.view(-1), 0) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()}
    for place in range(launch.grid[0]):
        _HERE.program, _HERE.grid = (place, 0), launch.grid
        run(**arguments, **launch.constants)


def _namespace(module: str, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A module's names, Gluon's being this module's; ``made`` holds those of the modules whose functions it uses."""
    if module in made:
        return made[module]
    space = made[module] = dict(vars(sys.modules[module]))
    for name, value in list(space.items()):
        if type(value).__name__ == "GluonJITFunction":
            plain = value.fn
            own = _namespace(plain.__module__, made)
            space[name] = types.FunctionType(plain.__code__, own, name, plain.__defaults__, plain.__closure__)
        elif type(value).__name__ == "constexpr":
            space[name] = value.value
    space |= {"gl": Gl, "tma": Tma, "mbarrier": Mbarrier, "fence_async_shared": fence_async_shared}
    space |= {"warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait}
    return space


class Values(Tensor):
    """A tensor in registers, which has a layout."""

    type = types.SimpleNamespace(layout=None)  # type: ignore[assignment]


class Buffer(Shared):
    """A buffer of which parts are taken, and into which rows are stored."""

    def index(self, i: int) -> Buffer:
        return Buffer(self.data[i])

    def permute(self, order: Sequence[int]) -> Buffer:
        return Buffer(self.data.permute(*order))

    def slice(self, start: int, length: int) -> Buffer:
        assert start >= 0 and start + length <= len(self.data)
        return Buffer(self.data[start : start + length])

    def store(self, values: Tensor) -> None:
        self.data.copy_(values)
        _HERE.fenced = False


def fence_async_shared() -> None:
    """What this thread stored may be read by copies and products."""
    _HERE.fenced = True


class Mbarrier(emulation.Mbarrier):
    """``gl.nvidia.hopper.mbarrier``."""

    @staticmethod
    def arrive(barrier: Barrier, count: int, pred: bool = True) -> None:
        assert _HERE.fenced, "rows were announced without a fence before"
        if pred:
            barrier.move(count, 0)


class Tma(emulation.Tma):
    """``gl.nvidia.hopper.tma``."""

    @staticmethod
    def async_copy_shared_to_global(to: Descriptor, coordinates: Sequence[int], source: Buffer) -> None:
        assert _HERE.fenced, "rows were copied without a fence before"
        row, column = coordinates
        rows, columns = (min(b, s - c) for b, s, c in zip(to.block, to.shape, coordinates, strict=True))

        def write() -> None:
            time.sleep(random.choice((0, _LONGEST_S)))
            if rows > 0 and columns > 0:
                view = to.base.flat.as_strided((rows, columns), to.strides, row * to.strides[0] + column)
                view.copy_(source.data[:rows, :columns])

        _HERE.stores.append(threading.Thread(target=write))
        _HERE.stores[-1].start()

    @staticmethod
    def store_wait(outstanding: int) -> None:
        while len(_HERE.stores) > outstanding:
            _HERE.stores.pop(0).join()


class Product(emulation.Product):
    """A product under way, onto sums that may be under way too."""

    def compute(self) -> None:
        if isinstance(self.acc, Product):
            self.acc = self.acc.value
        super().compute()


def warpgroup_mma(a: Buffer, b: Buffer, acc: Any, *, is_async: bool) -> Product:
    assert is_async
    _HERE.products.append(Product(a, b, acc))
    return _HERE.products[-1]  # type: ignore[no-any-return]


def warpgroup_mma_wait(outstanding: int, deps: Sequence[Any]) -> Any:
    time.sleep(random.choice((0, 2 * _LONGEST_S)))
    while len(_HERE.products) > outstanding:
        _HERE.products.pop(0).compute()
    results = tuple(dep if dep.value is None else dep.value for dep in deps)
    return results[0] if len(results) == 1 else results


class Gl(emulation.Gl):
    """``triton.experimental.gluon.language``."""

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: None) -> Any:
        made = emulation.Gl.allocate_shared_memory(dtype, shape, layout)
        return Buffer(made.data) if isinstance(made, Shared) else made

    @staticmethod
    def load(pointer: Pointer, mask: Any = True, other: int = 0) -> Any:
        return emulation.Gl.load(pointer, mask, other).as_subclass(Values)

    @staticmethod
    def zeros(shape: Sequence[int], dtype: torch.dtype, layout: None) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype).as_subclass(Values)

    @staticmethod
    def warp_specialize(
        partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]],
        warps: Sequence[int],
        registers: Sequence[int],
    ) -> None:
        watched = [(_watched(function), arguments) for function, arguments in partitions]
        emulation.Gl.warp_specialize(watched, warps, registers)


def _watched(function: Callable[..., None]) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        _HERE.stores, _HERE.fenced = [], True
        function(*arguments)
        assert not _HERE.stores, "a program ended before its last rows were read"

    return run
