"""Layers that take elements from here or there: slices, concatenations, gathers, choices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphs.trt.interpreter.rule import Call, Rule


def _slice(call: Call) -> tuple[Tensor]:
    """Slice: out[i] = in[start + i stride] along every dimension, ``shape`` elements of each.

    Inputs 1, 2 and 3, where they are there, are start, shape and stride; input 5 is ``axes``, those that the others are
    of, which are all where there is none. A stride of 0 repeats one element. Within STRICT_BOUNDS, the one mode that is
    known here, every index must be in the input.
    """
    call.one_of("mode", "STRICT_BOUNDS")
    call.only_inputs(6)
    if call.optional(4) is not None:
        raise call.layer.refuse("it fills what is out of bounds, but its mode allows nothing there")
    x = call.tensor(0)
    names = {"start": 1, "shape": 2, "stride": 3, "axes": 5}
    given = {name: call.optional(index) for name, index in names.items()}
    start, shape, stride, axes = (
        call.attribute(name) if value is None else tuple(value.tolist()) for name, value in given.items()
    )
    axes = range(x.dim()) if axes is None else [axis % x.dim() for axis in axes]
    for axis, begin, size, step in zip(axes, start, shape, stride, strict=True):
        index = begin + step * torch.arange(size)
        if size and not 0 <= int(index.min()) <= int(index.max()) < x.shape[axis]:
            raise call.layer.refuse(f"it takes {begin} + {step} i, i < {size}, of {x.shape[axis]} along axis {axis}")
        x = x.narrow(axis, begin, size) if step == 1 else x.index_select(axis, index)
    return (x,)


def _concatenation(call: Call) -> tuple[Tensor]:
    """Concatenation: the inputs one after the other along ``axis``; their other dimensions must be the same."""
    parts = [call.tensor(index) for index in range(len(call.inputs))]
    return (torch.cat(parts, dim=call.attribute("axis")),)


def _gather(call: Call) -> tuple[Tensor]:
    """Gather: elements of input 0 along ``axis`` at the indices, input 1.

    DEFAULT: out[a.., i.., b..] = in[a.., index[i..], b..]. ELEMENT: out[..i..] = in[..index[..i..]..], the index tensor
    having the input's rank and, off the axis, at most its dimensions. An index out of range is an error here.
    """
    mode = call.one_of("mode", "DEFAULT", "ELEMENT")
    call.one_of("num_elementwise_dims", 0)
    call.only_inputs(2)
    x, index, axis = call.tensor(0), call.tensor(1).long(), call.attribute("axis")
    size = x.shape[axis]
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise call.layer.refuse(f"it takes {int(index.min())} to {int(index.max())} of {size} along axis {axis}")
    if mode == "ELEMENT":
        return (x.gather(axis, index),)
    rows = x.index_select(axis, index.reshape(-1))
    return (rows.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]),)


def _select(call: Call) -> tuple[Tensor]:
    """Select: input 1 where input 0 is true, input 2 elsewhere. A dimension of 1 is stretched; ranks are equal."""
    condition, first, second = broadcast(call, 3)
    return (torch.where(condition, first, second),)


def broadcast(call: Call, count: int) -> Sequence[Tensor]:
    """The inputs, which must have one rank, and dimensions that are equal or 1."""
    call.only_inputs(count)
    tensors = [call.tensor(index) for index in range(count)]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len({len(shape) for shape in shapes}) != 1 or any(
        len({*sizes} - {1}) > 1 for sizes in zip(*shapes, strict=True)
    ):
        raise call.layer.refuse(f"its inputs do not go together: {shapes}")
    return tensors


RULES: dict[str, Rule] = {
    "SLICE": Rule(interface="ISliceLayer", body=_slice, attributes=("axes", "mode", "shape", "start", "stride")),
    "CONCATENATION": Rule(interface="IConcatenationLayer", body=_concatenation, attributes=("axis",)),
    "GATHER": Rule(interface="IGatherLayer", body=_gather, attributes=("axis", "mode", "num_elementwise_dims")),
    "SELECT": Rule(interface="ISelectLayer", body=_select),
}
