"""Rules for ops that move, cut, join or number elements."""

from __future__ import annotations

import operator

import onnx_ir as ir
import torch
from torch import fx

from graphs.onnx_lowering.context import Context, Lowered, Rule
from runtimes.errors import ExportError

aten = torch.ops.aten


def _getitem(ctx: Context, node: fx.Node) -> Lowered:
    source, index = node.args
    lowered = ctx.values[source]  # type: ignore[index]
    assert isinstance(lowered, tuple)
    return lowered[index]  # type: ignore[index]


def _sym_size(ctx: Context, node: fx.Node) -> Lowered:
    """A dimension as an int64 tensor of one element."""
    dim = node.args[1]
    return ctx.builder.op("Shape", [ctx.value(node.args[0])], start=dim, end=dim + 1)  # type: ignore[operator, arg-type]


def reshape_target(before: tuple[object, ...], after: tuple[object, ...], name: str) -> list[int]:
    """ONNX Reshape's shape: 0 copies a dimension, -1 stands for the one that is not static."""
    target = [
        0 if i < len(before) and str(before[i]) == str(dim) and not isinstance(dim, int)
        else dim if isinstance(dim, int)
        else -1
        for i, dim in enumerate(after)
    ]  # fmt: skip
    if target.count(-1) > 1:
        raise ExportError(f"node `{name}`: cannot reshape {before} to {after}, since two dimensions are unknown")
    return target


def _view(ctx: Context, node: fx.Node) -> Lowered:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    x, before, after = ctx.value(source), tuple(source.meta["val"].shape), tuple(node.meta["val"].shape)
    if len(before) == 4 and len(after) == 3 and x.name in ctx.flat and str(before[:2]) == str(after[:2]):
        return ctx.flat[x.name]
    target = reshape_target(before, after, node.name)
    out = ctx.builder.op("Reshape", [x, ctx.builder.constant(target, "int64")])
    if len(before) == 3 and len(after) == 4 and str(before[:2]) == str(after[:2]):
        ctx.flat[out.name] = x  # type: ignore[index]
    return out


def _transpose(ctx: Context, node: fx.Node) -> Lowered:
    x, a, b = node.args
    rank = x.meta["val"].dim()  # type: ignore[union-attr]
    perm = list(range(rank))
    perm[a], perm[b] = perm[b], perm[a]  # type: ignore[index]
    return ctx.builder.op("Transpose", [ctx.value(x)], perm=perm)


def _unsqueeze(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.builder.op("Unsqueeze", [ctx.value(node.args[0]), ctx.builder.constant([node.args[1]], "int64")])


def _expand(ctx: Context, node: fx.Node) -> Lowered:
    sizes = node.args[1]
    pieces: list[ir.Value] = []
    for size in sizes:  # type: ignore[union-attr]
        if isinstance(size, fx.Node):
            pieces.append(ctx.value(size))
        else:
            pieces.append(ctx.builder.constant([1 if size == -1 else size], "int64"))
    if all(isinstance(size, int) for size in sizes):  # type: ignore[union-attr]
        shape = ctx.builder.constant([1 if size == -1 else size for size in sizes], "int64")  # type: ignore[union-attr]
    else:
        shape = ctx.builder.op("Concat", pieces, axis=0)
    return ctx.builder.op("Expand", [ctx.value(node.args[0]), shape])


def _slice(ctx: Context, node: fx.Node) -> Lowered:
    x, dim, start, end = node.args[:4]
    bounds = [ctx.builder.constant([v], "int64") for v in (start or 0, end, dim)]
    return ctx.builder.op("Slice", [ctx.value(x), *bounds])


def _cat(ctx: Context, node: fx.Node) -> Lowered:
    axis = node.args[1] if len(node.args) > 1 else 0
    return ctx.builder.op("Concat", [ctx.value(x) for x in node.args[0]], axis=axis)  # type: ignore[union-attr, arg-type]


def _split(ctx: Context, node: fx.Node) -> Lowered:
    x, sizes = node.args[:2]
    axis = node.args[2] if len(node.args) > 2 else 0
    split = ctx.builder.constant(sizes, "int64")  # type: ignore[arg-type]
    return ctx.builder.multi("Split", [ctx.value(x), split], len(sizes), axis=axis)  # type: ignore[arg-type]


def _gather(ctx: Context, node: fx.Node) -> Lowered:
    x, axis, index = node.args[:3]
    return ctx.builder.op("GatherElements", [ctx.value(x), ctx.value(index)], axis=axis)  # type: ignore[arg-type]


def _index(ctx: Context, node: fx.Node) -> Lowered:
    x, indices = node.args[:2]
    if len(indices) != 1:  # type: ignore[arg-type]
        raise ExportError(f"node `{node.name}`: only one index tensor can be lowered, but got {len(indices)}")  # type: ignore[arg-type]
    return ctx.builder.op("Gather", [ctx.value(x), ctx.value(indices[0])], axis=0)  # type: ignore[index]


def _arange(ctx: Context, node: fx.Node) -> Lowered:
    end, zero, one = node.args[0], ctx.builder.constant(0, "int64"), ctx.builder.constant(1, "int64")
    if isinstance(end, fx.Node):
        limit = ctx.builder.op("Squeeze", [ctx.value(end)])
    else:
        limit = ctx.builder.constant(end, "int64")  # type: ignore[arg-type]
    return ctx.builder.op("Range", [zero, limit, one])


def _full_like(ctx: Context, node: fx.Node) -> Lowered:
    x, fill = node.args[:2]
    like = ctx.operand(fill, node.meta["val"])
    return ctx.builder.op("Expand", [like, ctx.builder.op("Shape", [ctx.value(x)])])


def _same(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.value(node.args[0])


RULES: dict[object, Rule] = {
    operator.getitem: _getitem,
    aten.sym_size.int: _sym_size,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten.flatten.using_ints: _view,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.cat.default: _cat,
    aten.split_with_sizes.default: _split,
    aten.gather.default: _gather,
    aten.index.Tensor: _index,
    aten.arange.default: _arange,
    aten.full_like.default: _full_like,
    aten.contiguous.default: _same,
}
