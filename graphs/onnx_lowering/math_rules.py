"""Rules for arithmetic, comparison, norms and convolution: one ONNX node each, or nearly."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphs.onnx_lowering.builder import DTYPES
from graphs.onnx_lowering.context import Context, Lowered, Rule

aten = torch.ops.aten


def _binary(op_type: str) -> Rule:
    def rule(ctx: Context, node: fx.Node) -> Lowered:
        a, b = node.args[:2]
        like = next(x.meta["val"] for x in (a, b) if isinstance(x, fx.Node))
        return ctx.builder.op(op_type, [ctx.operand(a, like), ctx.operand(b, like)])

    return rule


def _size_arithmetic(op_type: str) -> Rule:
    """Arithmetic on dimensions, which are int64 tensors of one element."""

    def rule(ctx: Context, node: fx.Node) -> Lowered:
        operands = [ctx.value(x) if isinstance(x, fx.Node) else ctx.builder.constant([x], "int64") for x in node.args]
        return ctx.builder.op(op_type, operands)

    return rule


def _not_equal(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.builder.op("Not", [_binary("Equal")(ctx, node)])  # type: ignore[list-item]


def _where(ctx: Context, node: fx.Node) -> Lowered:
    condition, a, b = node.args
    result = node.meta["val"]
    return ctx.builder.op("Where", [ctx.value(condition), ctx.operand(a, result), ctx.operand(b, result)])


def _clamp(ctx: Context, node: fx.Node) -> Lowered:
    low = node.args[1] if len(node.args) > 1 else None
    high = node.args[2] if len(node.args) > 2 else None
    out = ctx.value(node.args[0])
    for op_type, bound in (("Max", low), ("Min", high)):
        if isinstance(bound, fx.Node):
            out = ctx.builder.op(op_type, [out, ctx.value(bound)])
        elif bound is not None:
            out = ctx.builder.op(op_type, [out, ctx.operand(bound, node.meta["val"])])
    return out


def _cast(ctx: Context, node: fx.Node) -> Lowered:
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    return ctx.builder.op("Cast", [ctx.value(node.args[0])], to=int(DTYPES[dtype]))


def _gelu(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.builder.op("Gelu", [ctx.value(node.args[0])], approximate=node.kwargs.get("approximate", "none"))  # type: ignore[arg-type]


def _layer_norm(ctx: Context, node: fx.Node) -> Lowered:
    x, shape, scale, bias, eps = node.args[:5]
    inputs = [ctx.value(x), ctx.value(scale), ctx.value(bias)]
    return ctx.builder.op("LayerNormalization", inputs, axis=-len(shape), epsilon=eps)  # type: ignore[arg-type]


def _conv2d(ctx: Context, node: fx.Node) -> Lowered:
    x, weight, bias, stride = node.args[:4]
    return ctx.builder.op("Conv", [ctx.value(x), ctx.value(weight), ctx.value(bias)], strides=stride)  # type: ignore[arg-type]


def _avg_pool2d(ctx: Context, node: fx.Node) -> Lowered:
    x, kernel, stride = node.args[:3]
    return ctx.builder.op("AveragePool", [ctx.value(x)], kernel_shape=kernel, strides=stride)  # type: ignore[arg-type]


RULES: dict[object, Rule] = {
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.remainder.Scalar: _binary("Mod"),
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
    aten.ne.Tensor: _not_equal,
    aten.bitwise_and.Tensor: _binary("And"),
    aten.bitwise_or.Tensor: _binary("Or"),
    aten.__and__.Tensor: _binary("And"),
    aten.__or__.Tensor: _binary("Or"),
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.clamp.default: _clamp,
    aten.to.dtype: _cast,
    aten.gelu.default: _gelu,
    aten.layer_norm.default: _layer_norm,
    aten.conv2d.default: _conv2d,
    aten.avg_pool2d.default: _avg_pool2d,
    operator.add: _size_arithmetic("Add"),
    operator.sub: _size_arithmetic("Sub"),
    operator.mul: _size_arithmetic("Mul"),
}
