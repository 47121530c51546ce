"""Rules for ops that move, cut, join or number elements."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphs.node_args import argument, int_arg, ints_arg, list_arg, node_arg, tensor_value
from graphs.onnx_lowering.context import Context, Lowered, Rule
from runtimes.errors import ExportError

aten = torch.ops.aten


def _getitem(ctx: Context, node: fx.Node) -> Lowered:
    lowered = ctx.values[node_arg(node, 0)]
    assert isinstance(lowered, tuple), "torch.export takes items of nodes with several values only"
    return lowered[int_arg(node, 1)]


def _sym_size(ctx: Context, node: fx.Node) -> Lowered:
    """A dimension as an int64 tensor of one element."""
    x, dim = node_arg(node, 0), int_arg(node, 1)
    dim %= tensor_value(x).dim()
    return ctx.builder.op("Shape", [ctx.value(x)], start=dim, end=dim + 1)


def reshape_target(before: tuple[object, ...], after: tuple[object, ...], name: str) -> list[int]:
    """ONNX Reshape's shape: 0 copies a dimension, -1 stands for the one that is not static.

    Raises:
        ExportError: more than one dimension of ``after`` is neither static nor in its old place.
    """
    target = []
    for i, dim in enumerate(after):
        if isinstance(dim, int):
            target.append(dim)
        else:
            target.append(0 if i < len(before) and str(before[i]) == str(dim) else -1)
    if target.count(-1) > 1:
        raise ExportError(f"node `{name}`: cannot reshape {before} to {after}, since two dimensions are unknown")
    return target


def _view(ctx: Context, node: fx.Node) -> Lowered:
    source = node_arg(node, 0)
    x, before, after = ctx.value(source), tuple(tensor_value(source).shape), tuple(tensor_value(node).shape)
    same_start = str(before[:2]) == str(after[:2])
    if len(before) == 4 and len(after) == 3 and same_start and x in ctx.flat:
        return ctx.flat[x]
    target = reshape_target(before, after, node.name)
    out = ctx.builder.op("Reshape", [x, ctx.builder.constant(target, "int64")])
    if len(before) == 3 and len(after) == 4 and same_start:
        ctx.flat[out] = x
    return out


def _transpose(ctx: Context, node: fx.Node) -> Lowered:
    x, a, b = node_arg(node, 0), int_arg(node, 1), int_arg(node, 2)
    perm = list(range(tensor_value(x).dim()))
    perm[a], perm[b] = perm[b], perm[a]
    return ctx.builder.op("Transpose", [ctx.value(x)], perm=perm)


def _unsqueeze(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.builder.op(
        "Unsqueeze", [ctx.value(node_arg(node, 0)), ctx.builder.constant([int_arg(node, 1)], "int64")]
    )


def _expand(ctx: Context, node: fx.Node) -> Lowered:
    """A size of -1 keeps a dimension, and so does ONNX's 1."""
    sizes = list_arg(node, 1)
    static = [1 if size == -1 else size for size in sizes if isinstance(size, int)]
    if len(static) == len(sizes):
        shape = ctx.builder.constant(static, "int64")
    else:
        shape = ctx.builder.op("Concat", [ctx.size(1 if size == -1 else size) for size in sizes], axis=0)
    return ctx.builder.op("Expand", [ctx.value(node_arg(node, 0)), shape])


def _slice(ctx: Context, node: fx.Node) -> Lowered:
    if argument(node, 4, "step", 1) != 1:
        raise ExportError(f"node `{node.name}`: only slices with step 1 can be lowered")
    bounds = [0 if argument(node, 2) is None else int_arg(node, 2), int_arg(node, 3), int_arg(node, 1)]
    return ctx.builder.op(
        "Slice", [ctx.value(node_arg(node, 0)), *(ctx.builder.constant([v], "int64") for v in bounds)]
    )


def _cat(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.builder.op("Concat", [ctx.value(x) for x in list_arg(node, 0)], axis=int_arg(node, 1, 0))


def _split(ctx: Context, node: fx.Node) -> Lowered:
    sizes = ints_arg(node, 1)
    inputs = [ctx.value(node_arg(node, 0)), ctx.builder.constant(sizes, "int64")]
    return ctx.builder.multi("Split", inputs, len(sizes), axis=int_arg(node, 2, 0))


def _gather(ctx: Context, node: fx.Node) -> Lowered:
    x, axis, index = node_arg(node, 0), int_arg(node, 1), node_arg(node, 2)
    return ctx.builder.op("GatherElements", [ctx.value(x), ctx.value(index)], axis=axis)


def _index(ctx: Context, node: fx.Node) -> Lowered:
    indices = list_arg(node, 1)
    if len(indices) != 1:
        raise ExportError(f"node `{node.name}`: only one index tensor can be lowered, but got {len(indices)}")
    return ctx.builder.op("Gather", [ctx.value(node_arg(node, 0)), ctx.value(indices[0])], axis=0)


def _arange(ctx: Context, node: fx.Node) -> Lowered:
    end, zero, one = argument(node, 0), ctx.builder.constant(0, "int64"), ctx.builder.constant(1, "int64")
    if isinstance(end, fx.Node):
        limit = ctx.builder.op("Squeeze", [ctx.value(end)])
    else:
        limit = ctx.builder.constant(int_arg(node, 0), "int64")
    return ctx.builder.op("Range", [zero, limit, one])


def _full_like(ctx: Context, node: fx.Node) -> Lowered:
    fill = ctx.operand(argument(node, 1), tensor_value(node))
    return ctx.builder.op("Expand", [fill, ctx.builder.op("Shape", [ctx.value(node_arg(node, 0))])])


def _same(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.value(node_arg(node, 0))


def _nothing(ctx: Context, node: fx.Node) -> Lowered:
    return ()


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
    aten._assert_tensor_metadata.default: _nothing,  # there only where the pass drop_noops was left out
}
