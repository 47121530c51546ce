"""Rules for arithmetic, comparison, norms and convolution: one ONNX node each, or nearly."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphs.node_args import argument, float_arg, ints_arg, list_arg, node_arg, only_arguments, tensor_value
from graphs.onnx_lowering.builder import DTYPES
from graphs.onnx_lowering.context import Context, Lowered, Rule, dtype_name
from runtimes.errors import ExportError

aten = torch.ops.aten


def _binary(op_type: str) -> Rule:
    def rule(ctx: Context, node: fx.Node) -> Lowered:
        only_arguments(node, 2)
        a, b = argument(node, 0), argument(node, 1)
        like = next(tensor_value(x) for x in (a, b) if isinstance(x, fx.Node))
        return ctx.builder.op(op_type, [ctx.operand(a, like), ctx.operand(b, like)])

    return rule


def _size_arithmetic(op_type: str) -> Rule:
    """Arithmetic on dimensions, which are int64 tensors of one element."""

    def rule(ctx: Context, node: fx.Node) -> Lowered:
        return ctx.builder.op(op_type, [ctx.size(argument(node, 0)), ctx.size(argument(node, 1))])

    return rule


def _floor_divide(ctx: Context, node: fx.Node) -> Lowered:
    """(a - a mod b) / b, since ONNX's Div of whole numbers rounds towards zero."""
    only_arguments(node, 2)
    b, like = ctx.builder, tensor_value(node)
    if like.dtype.is_floating_point:
        raise ExportError(f"node `{node.name}`: only whole numbers can be divided and rounded down")
    dividend, divisor = ctx.operand(argument(node, 0), like), ctx.operand(argument(node, 1), like)
    return b.op("Div", [b.op("Sub", [dividend, b.op("Mod", [dividend, divisor])]), divisor])


def _where(ctx: Context, node: fx.Node) -> Lowered:
    result = tensor_value(node)
    branches = [ctx.operand(argument(node, index), result) for index in (1, 2)]
    return ctx.builder.op("Where", [ctx.value(node_arg(node, 0)), *branches])


def _clamp(ctx: Context, node: fx.Node) -> Lowered:
    out = ctx.value(node_arg(node, 0))
    for op_type, bound in (("Max", argument(node, 1, "min")), ("Min", argument(node, 2, "max"))):
        if bound is not None:
            out = ctx.builder.op(op_type, [out, ctx.operand(bound, tensor_value(node))])
    return out


def _cast(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.builder.op("Cast", [ctx.value(node_arg(node, 0))], to=int(DTYPES[dtype_name(tensor_value(node))]))


def _gelu(ctx: Context, node: fx.Node) -> Lowered:
    form = str(node.kwargs.get("approximate", "none"))
    return ctx.builder.op("Gelu", [ctx.value(node_arg(node, 0))], approximate=form)


def _matmul(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.builder.op("MatMul", [ctx.value(node_arg(node, 0)), ctx.value(node_arg(node, 1))])


def _layer_norm(ctx: Context, node: fx.Node) -> Lowered:
    inputs = [ctx.value(node_arg(node, index)) for index in (0, 2, 3)]
    return ctx.builder.op("LayerNormalization", inputs, axis=-len(list_arg(node, 1)), epsilon=float_arg(node, 4))


def _avg_pool2d(ctx: Context, node: fx.Node) -> Lowered:
    only_arguments(node, 3)
    return ctx.builder.op(
        "AveragePool", [ctx.value(node_arg(node, 0))], kernel_shape=ints_arg(node, 1), strides=ints_arg(node, 2)
    )


RULES: dict[object, Rule] = {
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.floor_divide.default: _floor_divide,
    aten.remainder.Scalar: _binary("Mod"),  # both take the divisor's sign
    aten.matmul.default: _matmul,
    aten.le.Tensor: _binary("LessOrEqual"),
    aten.le.Scalar: _binary("LessOrEqual"),
    aten.lt.Tensor: _binary("Less"),
    aten.lt.Scalar: _binary("Less"),
    aten.ge.Tensor: _binary("GreaterOrEqual"),
    aten.ge.Scalar: _binary("GreaterOrEqual"),
    aten.gt.Tensor: _binary("Greater"),
    aten.gt.Scalar: _binary("Greater"),
    aten.eq.Tensor: _binary("Equal"),
    aten.eq.Scalar: _binary("Equal"),
    aten.bitwise_and.Tensor: _binary("And"),
    aten.bitwise_or.Tensor: _binary("Or"),
    aten.__and__.Tensor: _binary("And"),
    aten.__or__.Tensor: _binary("Or"),
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.clamp.default: _clamp,
    aten.to.dtype: _cast,
    aten.gelu.default: _gelu,
    aten.layer_norm.default: _layer_norm,
    aten.avg_pool2d.default: _avg_pool2d,
    operator.add: _size_arithmetic("Add"),
    operator.sub: _size_arithmetic("Sub"),
}
