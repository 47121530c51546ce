"""A stand-in for the part of Gluon that the kernel for Hopper uses, so that its protocol is tested without a GPU.

Triton's interpreter does not run Gluon. Here every partition of a program is a thread; a copy arrives some time after
it was issued, from a thread of its own; a product is computed when it is waited for and not before; barriers count
arrivals and bytes as an mbarrier does. A buffer that is released too early therefore holds the wrong rows when it is
read, a wrong parity reads a buffer too early or hangs, and what hangs fails after ``PATIENCE_S``. Layouts are ignored:
whether they fit is the compiler's to say.
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

PATIENCE_S = 30.0
_DELAY_S = 1e-3
"""Of what is under way: none, or long against what the other threads do meanwhile."""
_HERE = threading.local()


def run_emulated(launch: Launch) -> None:
    """Runs a launch of a Gluon function on CPU tensors."""
    function = _emulated(launch.function)
    arguments = {k: Pointer(v.view(-1), 0) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()}
    for y in range(launch.grid[1]):
        for x in range(launch.grid[0]):
            _HERE.program, _HERE.grid = (x, y), launch.grid
            function(**arguments, **launch.constants)


def _emulated(function: Any) -> Callable[..., None]:
    """The function in a copy of its module's namespace, in which Gluon's names mean this module's."""
    space = dict(vars(sys.modules[function.fn.__module__]))
    space |= {"gl": Gl, "tma": Tma, "mbarrier": Mbarrier}
    space |= {"warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait}
    for name, value in list(space.items()):
        if type(value).__name__ == "GluonJITFunction":
            plain = value.fn
            space[name] = types.FunctionType(plain.__code__, space, name, plain.__defaults__, plain.__closure__)
        elif type(value).__name__ == "constexpr":
            space[name] = value.value
    return space[function.fn.__name__]  # type: ignore[no-any-return]


class Scalar(int):
    """An integer that can be cast, as Gluon's can."""

    def to(self, dtype: object) -> Scalar:
        return self


class Pointer:
    """Some elements of a flat tensor."""

    def __init__(self, flat: Tensor, offset: Any) -> None:
        self.flat, self.offset = flat, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.offset + more)


class Shared:
    """A buffer in shared memory; it holds NaN until something is copied there."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))


class Barrier:
    """An mbarrier: a phase ends when as many arrived as it was made for, and every byte that was announced."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.needed = self.pending = self.bytes = self.phase = 0

    def move(self, arrivals: int, byte_count: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += byte_count
            assert self.pending >= 0, "more arrivals than a phase takes"
            if self.pending == 0 and self.bytes == 0:
                self.pending = self.needed
                self.phase += 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            passed = self.changed.wait_for(lambda: self.phase & 1 != parity, timeout=PATIENCE_S)
        assert passed, "a barrier was waited for in vain"


class Barriers(list[Barrier]):
    """An array of them, as it is allocated."""

    def index(self, i: int) -> Barrier:  # type: ignore[override]
        return self[i]


class Mbarrier:
    """``gl.nvidia.hopper.mbarrier``."""

    @staticmethod
    def MBarrierLayout() -> None: ...

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.needed = barrier.pending = count

    @staticmethod
    def expect(barrier: Barrier, byte_count: int) -> None:
        barrier.move(1, byte_count)

    @staticmethod
    def arrive(barrier: Barrier, count: int) -> None:
        barrier.move(count, 0)

    @staticmethod
    def wait(barrier: Barrier, parity: int) -> None:
        barrier.wait(parity)


class Descriptor:
    """A tensor descriptor: blocks of a strided tensor, zeros outside."""

    def __init__(self, base: Pointer, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> None:
        self.base, self.shape, self.strides, self.block = base, shape, strides, block

    def read(self, coordinates: Sequence[int]) -> Tensor:
        offset: Any = torch.tensor(int(self.base.offset))
        inside: Any = torch.tensor(True)
        for axis, (first, width) in enumerate(zip(coordinates, self.block, strict=True)):
            view = [-1 if axis == other else 1 for other in range(len(self.block))]
            at = (first + torch.arange(width)).view(view)
            offset = offset + at * self.strides[axis]
            inside = inside & (at >= 0) & (at < self.shape[axis])
        return torch.where(inside, self.base.flat[torch.where(inside, offset, 0)], 0)


class Tma:
    """``gl.nvidia.hopper.tma``."""

    @staticmethod
    def make_tensor_descriptor(
        base: Pointer, shape: Sequence[int], strides: Sequence[int], block: Sequence[int], layout: None
    ) -> Descriptor:
        return Descriptor(base, shape, strides, block)

    @staticmethod
    def async_copy_global_to_shared(
        source: Descriptor, coordinates: Sequence[int], barrier: Barrier, to: Shared
    ) -> None:
        def arrive() -> None:
            time.sleep(random.choice((0, _DELAY_S)))
            to.data.copy_(source.read(coordinates))
            barrier.move(0, -to.data.nbytes)

        threading.Thread(target=arrive).start()


class Product:
    """A product under way: operands are read when it is computed."""

    def __init__(self, a: Any, b: Shared, acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.value: Tensor | None = None

    def compute(self) -> None:
        a = self.a.data if isinstance(self.a, Shared) else self.a
        product = a.float() @ self.b.data.float()
        self.value = product if self.acc is None else self.acc + product


def warpgroup_mma(a: Any, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    product = Product(a, b, acc if use_acc else None)
    _HERE.products.append(product)
    return product


def warpgroup_mma_wait(outstanding: int, deps: Sequence[Any]) -> Any:
    time.sleep(random.choice((0, 2 * _DELAY_S)))
    while len(_HERE.products) > outstanding:
        _HERE.products.pop(0).compute()
    results = tuple(dep.value if isinstance(dep, Product) else dep for dep in deps)
    assert all(result is not None for result in results), "a product was taken before it was waited for"
    return results[0] if len(results) == 1 else results


class Gl:
    """``triton.experimental.gluon.language``."""

    float32, bfloat16, int32, int64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
    exp2 = staticmethod(torch.exp2)
    static_range = range

    @staticmethod
    def _layout(*_: Any) -> None: ...

    NVMMADistributedLayout = SliceLayout = BlockedLayout = DotOperandLayout = _layout

    class NVMMASharedLayout:
        @staticmethod
        def get_default_for(*_: Any) -> None: ...

    @staticmethod
    def program_id(axis: int) -> Scalar:
        return Scalar(_HERE.program[axis])

    @staticmethod
    def num_programs(axis: int) -> Scalar:
        return Scalar(_HERE.grid[axis])

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: None) -> Any:
        if dtype == torch.int64:
            return Barriers(Barrier() for _ in range(shape[0]))
        return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype))

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return torch.maximum(*Gl._tensors(a, b)) if isinstance(a, Tensor) or isinstance(b, Tensor) else max(a, b)

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        return torch.minimum(*Gl._tensors(a, b)) if isinstance(a, Tensor) or isinstance(b, Tensor) else min(a, b)

    @staticmethod
    def _tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
        like = a if isinstance(a, Tensor) else b
        return tuple(x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype) for x in (a, b))  # type: ignore[return-value]

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, Tensor):
            return torch.where(condition, a, b)
        return a if condition else b

    @staticmethod
    def load(pointer: Pointer, mask: Any = True, other: int = 0) -> Any:
        if not isinstance(pointer.offset, Tensor):
            return Scalar(pointer.flat[pointer.offset])
        return torch.where(mask, pointer.flat[torch.where(mask, pointer.offset, 0)], other)

    @staticmethod
    def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        mask = mask.expand_as(value)
        pointer.flat[pointer.offset.expand_as(value)[mask]] = value[mask]

    @staticmethod
    def arange(begin: int, end: int, layout: None) -> Tensor:
        return torch.arange(begin, end)

    @staticmethod
    def zeros(shape: Sequence[int], dtype: torch.dtype, layout: None) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    @staticmethod
    def full(shape: Sequence[int], value: float, dtype: torch.dtype, layout: None) -> Tensor:
        return torch.full(tuple(shape), value, dtype=dtype)

    @staticmethod
    def max(x: Tensor, axis: int) -> Tensor:
        return x.amax(axis)

    @staticmethod
    def sum(x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    @staticmethod
    def convert_layout(x: Tensor, layout: None) -> Tensor:
        return x

    @staticmethod
    def permute(x: Tensor, order: Sequence[int]) -> Tensor:
        return x.permute(*order)

    @staticmethod
    def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(*shape)

    @staticmethod
    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 0], x[..., 1]

    @staticmethod
    def warp_specialize(
        partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]],
        warps: Sequence[int],
        registers: Sequence[int],
    ) -> None:
        failures: list[BaseException] = []
        program, grid = _HERE.program, _HERE.grid

        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            _HERE.program, _HERE.grid, _HERE.products = program, grid, []
            try:
                function(*arguments)
                assert not _HERE.products, "a product was never waited for"
            except BaseException as failure:  # noqa: BLE001 - carried to the test's thread
                failures.append(failure)

        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
