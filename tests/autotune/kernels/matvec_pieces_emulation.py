"""A stand-in for the part of Gluon that :mod:`autotune.kernels.matvec_pieces` uses, on CPU tensors.

Triton's interpreter does not run Gluon. Here tensors are torch's and layouts are ignored: whether they fit is the compiler's
to say, which refuses a conversion that would move data where the kernel says that it must not.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autotune.launch import Launch

_PROGRAM = [0]


class Value:
    """A tensor with the methods that Gluon's have."""

    def __init__(self, data: Any) -> None:
        self.data = torch.as_tensor(data)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        if bitcast and dtype == torch.bfloat16:
            return Value(self.data.to(torch.int16).view(dtype))
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def __getitem__(self, key: Any) -> Value:
        return Value(self.data[key])


def _plain(x: Any) -> Any:
    return x.data if isinstance(x, Value) else x


def _operator(name: str) -> Callable[[Value, Any], Value]:
    return lambda self, other: Value(getattr(self.data, name)(_plain(other)))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "rshift", "lt", "ge", "eq"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("radd", "rsub", "rmul", "rtruediv"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Some elements of a flat tensor."""

    def __init__(self, flat: Tensor, offset: Any = 0) -> None:
        self.flat, self.offset = flat, offset
        self.dtype = types.SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.offset + _plain(more))

    def to(self, dtype: torch.dtype, bitcast: bool) -> Pointer:
        """Half-words become int32, in which torch can shift them."""
        assert dtype == torch.uint16 and bitcast and isinstance(self.offset, int)
        return Pointer(self.flat.view(torch.int16).int() & 0xFFFF, 0)


class Shared:
    """A buffer in shared memory; it holds NaN until something is stored there."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: None) -> Shared:
        assert dtype == self.data.dtype
        return Shared(self.data.view(*shape))

    def load(self, layout: None) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        assert value.data.shape == self.data.shape and value.data.dtype == self.data.dtype
        self.data.copy_(value.data)


class Gl:
    """``triton.experimental.gluon.language``."""

    constexpr = None
    int1, float32, bfloat16, int16, int32, int64, uint16 = (
        torch.bool,
        torch.float32,
        torch.bfloat16,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
    )
    static_range = range

    @staticmethod
    def _layout(*_: Any, **__: Any) -> None: ...

    NVMMADistributedLayout = SliceLayout = BlockedLayout = DotOperandLayout = DistributedLinearLayout = _layout
    SwizzledSharedLayout = _layout

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: None) -> Shared:
        return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype))

    @staticmethod
    def thread_barrier() -> None: ...

    @staticmethod
    def pointer_type(dtype: torch.dtype) -> torch.dtype:
        return dtype

    @staticmethod
    def program_id(axis: int) -> int:
        return _PROGRAM[0]

    @staticmethod
    def arange(begin: int, end: int, layout: None) -> Value:
        return Value(torch.arange(begin, end, dtype=torch.int32))

    @staticmethod
    def full(shape: Sequence[int], value: float, dtype: torch.dtype, layout: None) -> Value:
        return Value(torch.full(tuple(shape), value, dtype=dtype))

    @staticmethod
    def load(pointer: Pointer, mask: Any = True, other: float | None = None, eviction_policy: str = "") -> Value:
        """What is left undefined is whatever lies there."""
        mask = torch.as_tensor(_plain(mask))
        found = pointer.flat[torch.where(mask, pointer.offset, 0)]
        return Value(found if other is None else torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))

    @staticmethod
    def store(pointer: Pointer, value: Value, mask: Value) -> None:
        inside = mask.data.expand_as(value.data)
        pointer.flat[pointer.offset.expand_as(value.data)[inside]] = value.data[inside]

    @staticmethod
    def minimum(a: Value, b: int) -> Value:
        return Value(a.data.clamp(max=b))

    @staticmethod
    def where(condition: Value, a: Any, b: Any) -> Value:
        return Value(torch.where(condition.data, _plain(a), _plain(b)))

    @staticmethod
    def rsqrt(x: Value) -> Value:
        return Value(x.data.rsqrt())

    @staticmethod
    def exp2(x: Value) -> Value:
        return Value(x.data.exp2())

    @staticmethod
    def sum(x: Value, axis: int) -> Value:
        return Value(x.data.sum(axis))

    @staticmethod
    def convert_layout(x: Value, layout: None, assert_trivial: bool = False) -> Value:
        return x

    @staticmethod
    def expand_dims(x: Value, axis: int) -> Value:
        return Value(x.data.unsqueeze(axis))

    @staticmethod
    def permute(x: Value, order: Sequence[int]) -> Value:
        return Value(x.data.permute(*order))

    @staticmethod
    def reshape(x: Value, shape: Sequence[int]) -> Value:
        return Value(x.data.reshape(*shape))

    @staticmethod
    def join(a: Value, b: Value) -> Value:
        return Value(torch.stack([a.data, b.data], -1))


def _mma_v2(a: Value, b: Value, acc: Value) -> Value:
    return Value(acc.data + a.data.float() @ b.data.float())


def _numbers(half: Value, even: Value, odd: Value, scale: Value, rest: Value) -> tuple[Value, ...]:
    """What the assembly does; every fused multiply-add rounds once."""
    found = []
    for i, base in enumerate((even, odd, even, odd)):
        bits = ((half.data >> (4 * i)) & 15 | 0x4300).to(torch.int16)
        exact = bits.view(torch.bfloat16).double() + base.data.double()
        small = (exact * rest.data.double()).bfloat16().double()
        found.append(Value((exact * scale.data.double() + small).bfloat16()))
    return tuple(found)


def run_emulated(launch: Launch) -> None:
    """Runs a launch of the kernel on CPU tensors, one program after another."""
    space = dict(vars(sys.modules[launch.function.fn.__module__]))
    space |= {"gl": Gl, "mma_v2": _mma_v2, "wait": lambda _: None, "release": lambda _: None}
    for name, value in list(space.items()):
        if type(value).__name__ == "GluonJITFunction":
            plain = value.fn
            space[name] = types.FunctionType(plain.__code__, space, name, plain.__defaults__, plain.__closure__)
        elif type(value).__name__ == "ConstexprFunction":
            space[name] = Gl._layout if name.endswith("_layout") else value.fn
    space |= {"_numbers": _numbers, "_masked": _masked, "_half_bytes": _half_bytes}
    arguments = {k: Pointer(v.view(-1)) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()}
    for program in range(launch.grid[0]):
        _PROGRAM[0] = program
        space[launch.function.fn.__name__](**arguments, **launch.constants)


def _half_bytes(half: Value) -> tuple[Value, ...]:
    found = [(half.data >> shift) & 15 | 0x4300 for shift in (0, 4, 8, 12)]
    return tuple(Value(bits.to(torch.int16).view(torch.bfloat16)) for bits in found)


def _masked(x: Value, mask: Value) -> Value:
    return Value((x.data.view(torch.int16) & mask.data).view(torch.bfloat16))
