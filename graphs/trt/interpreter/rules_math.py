"""Layers that compute: element by element, along axes, and products."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from graphs.trt.interpreter.rule import Call, Rule
from graphs.trt.interpreter.rules_places import broadcast

_ELEMENTWISE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add, "PROD": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum, "SUB": torch.sub,
    "AND": torch.logical_and, "OR": torch.logical_or, "EQUAL": torch.eq, "GREATER": torch.gt, "LESS": torch.lt,
    "FLOOR_DIV": lambda a, b: torch.div(a, b, rounding_mode="floor"),
}  # fmt: skip
_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "SQRT": torch.sqrt, "RECIP": torch.reciprocal, "COS": torch.cos, "SIN": torch.sin, "NEG": torch.neg,
}  # fmt: skip
_REDUCE: Mapping[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "AVG": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "MAX": lambda x, axes, keep: x.amax(axes, keepdim=keep),
}
_ACTIVATION: Mapping[str, Callable[[Tensor], Tensor]] = {
    "GELU_TANH": lambda x: F.gelu(x, approximate="tanh"),
    "GELU_ERF": F.gelu,
}


def _elementwise(call: Call) -> tuple[Tensor]:
    """ElementWise: ``op`` on each pair of elements. Both inputs have one type and one rank; a dimension of 1 is stretched.

    In bf16 the result is the exact one rounded once.
    """
    a, b = broadcast(call, 2)
    if a.dtype != b.dtype:
        raise call.layer.refuse(f"its inputs are {a.dtype} and {b.dtype}")
    return (_ELEMENTWISE[call.one_of("op", *_ELEMENTWISE)](a, b),)


def _unary(call: Call) -> tuple[Tensor]:
    """Unary: ``op`` of each element."""
    call.only_inputs(1)
    return (_UNARY[call.one_of("op", *_UNARY)](call.tensor(0)),)


def _reduce(call: Call) -> tuple[Tensor]:
    """Reduce: ``op`` over the axes whose bits are set in ``axes``; they stay as 1 if ``keep_dims``."""
    call.only_inputs(1)
    reduce = _REDUCE[call.one_of("op", *_REDUCE)]
    return (reduce(call.tensor(0), axes_of(call), call.attribute("keep_dims")),)


def axes_of(call: Call) -> list[int]:
    """The axes of a mask of bits; the lowest bit is dimension 0."""
    mask: int = call.attribute("axes")
    return [axis for axis in range(mask.bit_length()) if mask >> axis & 1]


def _activation(call: Call) -> tuple[Tensor]:
    """Activation: a function of each element; GELU reads neither ``alpha`` nor ``beta``.

    GELU_TANH(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))).
    """
    call.only_inputs(1)
    return (_ACTIVATION[call.one_of("type", *_ACTIVATION)](call.tensor(0)),)


def _matrix_multiply(call: Call) -> tuple[Tensor]:
    """MatrixMultiply: op0(input 0) times op1(input 1), the last two dimensions being matrices; TRANSPOSE turns one.

    bf16 products are added up in fp32 and rounded once.
    """
    call.only_inputs(2)
    sides = []
    for index in (0, 1):
        turned = call.one_of(f"op{index}", "NONE", "TRANSPOSE") == "TRANSPOSE"
        sides.append(call.tensor(index).transpose(-1, -2) if turned else call.tensor(index))
    if sides[0].dim() != sides[1].dim() or sides[0].dim() < 2:
        raise call.layer.refuse(f"it multiplies {tuple(sides[0].shape)} by {tuple(sides[1].shape)}")
    return (torch.matmul(*sides),)


def _normalization(call: Call) -> tuple[Tensor]:
    """Normalization: (x - mean) / sqrt(variance + epsilon) * scale + bias, over ``axes``, in one group.

    Inputs: x, scale, bias; the last two are stretched over dimensions of 1. In fp32, rounded once.
    """
    call.only_inputs(3)
    call.one_of("is_v2", True)
    call.one_of("num_groups", 1)
    x, scale, bias = (tensor.float() for tensor in broadcast(call, 3))
    axes = axes_of(call)
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    normed = centred / torch.sqrt(variance + call.attribute("epsilon"))
    return ((normed * scale + bias).to(call.out_dtype),)


def _dequantize(call: Call) -> tuple[Tensor]:
    """Dequantize: (code - zero point) * scale in ``to_type``, the zero point being 0.

    Scales, input 1, are one, or one for each index along ``axis``, or of the rank of the codes: then each stands for a
    block, as many codes as its dimension is smaller.
    """
    call.only_inputs(2)
    call.one_of("block_shape", None)
    codes, scales = call.tensor(0), call.tensor(1)
    if scales.dim() == 1:
        axis = call.attribute("axis")
        scales = scales.view([-1 if axis == other else 1 for other in range(codes.dim())])
    elif scales.dim() == codes.dim():
        for axis, (many, few) in enumerate(zip(codes.shape, scales.shape, strict=True)):
            if many % few:
                raise call.layer.refuse(f"{many} codes do not divide into {few} blocks along axis {axis}")
            scales = scales if many == few else scales.repeat_interleave(many // few, dim=axis)
    elif scales.dim():
        raise call.layer.refuse(f"scales of {tuple(scales.shape)} do not go with codes of {tuple(codes.shape)}")
    return ((codes.float() * scales.float()).to(call.dtype(call.attribute("to_type"))),)


RULES: dict[str, Rule] = {
    "ELEMENTWISE": Rule(interface="IElementWiseLayer", body=_elementwise, attributes=("op",)),
    "UNARY": Rule(interface="IUnaryLayer", body=_unary, attributes=("op",)),
    "REDUCE": Rule(interface="IReduceLayer", body=_reduce, attributes=("axes", "keep_dims", "op")),
    "ACTIVATION": Rule(interface="IActivationLayer", body=_activation, attributes=("alpha", "beta", "type")),
    "MATRIX_MULTIPLY": Rule(interface="IMatrixMultiplyLayer", body=_matrix_multiply, attributes=("op0", "op1")),
    "NORMALIZATION": Rule(
        interface="INormalizationLayer", body=_normalization, attributes=("axes", "epsilon", "is_v2", "num_groups")
    ),
    "DEQUANTIZE": Rule(interface="IDequantizeLayer", body=_dequantize, attributes=("axis", "block_shape", "to_type")),
}
