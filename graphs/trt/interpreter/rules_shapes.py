"""Layers that make a tensor from nothing, or give one another shape or type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graphs.trt.interpreter.rule import Call, Rule


def _constant(call: Call) -> tuple[Tensor]:
    """Constant: a tensor of ``shape`` filled with ``weights``, row by row.

    Weights of a type that numpy lacks (bf16, int4, fp8) are not shown; they are the ONNX initializer of the layer's name.
    """
    weights, dtype = call.attribute("weights"), call.out_dtype
    if isinstance(weights, np.ndarray):
        value = torch.from_numpy(np.array(weights)).to(dtype)
    else:
        value = call.constant(call.layer).to(dtype)
    return (value.reshape(call.attribute("shape")),)


def _shape(call: Call) -> tuple[Tensor]:
    """Shape: the input's dimensions, int64 [rank]."""
    return (torch.tensor(call.tensor(0).shape, dtype=torch.int64),)


def _cast(call: Call) -> tuple[Tensor]:
    """Cast: every element converted to ``to_type``; to a float rounded to nearest even, to an integer cut off."""
    return (call.tensor(0).to(call.dtype(call.attribute("to_type"))),)


def _fill(call: Call) -> tuple[Tensor]:
    """Fill: out[i] = alpha + beta . i for LINSPACE.

    Input 0, where there is one, is the shape; inputs 1 and 2, which come together, are alpha, a scalar, and beta, one
    for each dimension.
    """
    call.one_of("operation", "LINSPACE")
    call.only_inputs(3)
    sizes, alpha, beta = (call.optional(index) for index in range(3))
    shape = call.attribute("shape") if sizes is None else tuple(sizes.tolist())
    if (alpha is None) != (beta is None):
        raise call.layer.refuse("alpha and beta must both be inputs or both be not")
    start = call.attribute("alpha") if alpha is None else alpha.item()
    steps = [call.attribute("beta")] * len(shape) if beta is None else beta.tolist()
    dtype = call.dtype(call.attribute("to_type"))
    out = torch.full(shape, start, dtype=dtype)
    for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
        along = [-1 if axis == other else 1 for other in range(len(shape))]
        out = out + (torch.arange(size) * step).to(dtype).view(along)
    return (out,)


def _shuffle(call: Call) -> tuple[Tensor]:
    """Shuffle: ``first_transpose``, then a reshape, then ``second_transpose``.

    The new dimensions are ``reshape_dims``, or input 1 where there is one; where there is neither, the shape stays. -1
    takes what is left; 0 copies the dimension at its place if ``zero_is_placeholder``, and is an empty one if not.
    """
    call.only_inputs(2)
    x = _transposed(call.tensor(0), call.attribute("first_transpose"))
    given = call.optional(1)
    dims = call.attribute("reshape_dims") if given is None else tuple(given.tolist())
    if dims is not None:
        zero = call.attribute("zero_is_placeholder")
        x = x.reshape([x.shape[axis] if dim == 0 and zero else dim for axis, dim in enumerate(dims)])
    return (_transposed(x, call.attribute("second_transpose")),)


def _transposed(x: Tensor, permutation: Sequence[int]) -> Tensor:
    """Only as many entries count as there are dimensions."""
    order = tuple(permutation[: x.dim()])
    return x if order == tuple(range(x.dim())) else x.permute(order)


def _unsqueeze(call: Call) -> tuple[Tensor]:
    """Unsqueeze: dimensions of 1 at the axes, input 1, which count in the output and may count from its end."""
    x, axes = call.tensor(0), call.tensor(1).tolist()
    call.only_inputs(2)
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return (x,)


def _squeeze(call: Call) -> tuple[Tensor]:
    """Squeeze: without the dimensions at the axes, input 1, each of which must be 1. Without input 1, all that are 1."""
    x, given = call.tensor(0), call.optional(1)
    call.only_inputs(2)
    if given is None:
        axes = [axis for axis, size in enumerate(x.shape) if size == 1]
    else:
        axes = sorted({axis % x.dim() for axis in given.tolist()})
    if any(x.shape[axis] != 1 for axis in axes):
        raise call.layer.refuse(f"it takes axes {axes} away from {tuple(x.shape)}, which are not all 1")
    return (x.reshape([size for axis, size in enumerate(x.shape) if axis not in axes]),)


RULES: dict[str, Rule] = {
    "CONSTANT": Rule(interface="IConstantLayer", body=_constant, attributes=("shape", "weights")),
    "SHAPE": Rule(interface="IShapeLayer", body=_shape),
    "CAST": Rule(interface="ICastLayer", body=_cast, attributes=("to_type",)),
    "FILL": Rule(interface="IFillLayer", body=_fill, attributes=("alpha", "beta", "operation", "shape", "to_type")),
    "SHUFFLE": Rule(
        interface="IShuffleLayer",
        body=_shuffle,
        attributes=("first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder"),
    ),
    "UNSQUEEZE": Rule(interface="IUnsqueezeLayer", body=_unsqueeze),
    "SQUEEZE": Rule(interface="ISqueezeLayer", body=_squeeze),
}
