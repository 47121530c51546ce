"""Rules for rotary embedding and attention that the dialects share, and the shapes that go in and out of them.

Legend: B batch, S tokens in the chunk, N heads, G key-value heads, D head_dim, C slots of a linear cache.

References: ONNX 1.20 RotaryEmbedding, Attention, TensorScatter.
"""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from autotune.kernels.rotary import inverse_frequencies
from graphs.node_args import argument, float_arg, int_arg, node_arg, tensor_value
from graphs.onnx_lowering.builder import DTYPES
from graphs.onnx_lowering.context import Context, Lowered, Rule, dtype_name
from graphs.ops import gemma3c
from runtimes.errors import ExportError


def flat(ctx: Context, node: fx.Node) -> ir.Value:
    """[B, S, N, D] as [B, S, N * D], without a node where it came from that."""
    value = ctx.value(node)
    if value in ctx.flat:
        return ctx.flat[value]
    count, dim = tensor_value(node).shape[2:]
    return ctx.builder.op("Reshape", [value, ctx.builder.constant([0, 0, count * dim], "int64")])


def heads(ctx: Context, rows: ir.Value, node: fx.Node) -> ir.Value:
    """[B, S, N * D] as [B, S, N, D], remembered by ``flat``."""
    count, dim = tensor_value(node).shape[2:]
    out = ctx.builder.op("Reshape", [rows, ctx.builder.constant([0, 0, count, dim], "int64")])
    ctx.flat[out] = rows
    return out


def heads_of(node: fx.Node) -> int:
    """N of [B, S, N, D], which is never a symbol."""
    return int(tensor_value(node).shape[2])


def _rotary_table(ctx: Context, node: fx.Node) -> Lowered:
    """cos, sin of position * frequency: fp32 [B, S, D/2]."""
    frequency = inverse_frequencies(int_arg(node, 1), float_arg(node, 2), float_arg(node, 3)).numpy()
    as_float = ctx.builder.op("Cast", [ctx.value(node_arg(node, 0))], to=int(DTYPES["float32"]))
    column = ctx.builder.op("Unsqueeze", [as_float, ctx.builder.constant([-1], "int64")])
    angle = ctx.builder.op("Mul", [column, ctx.builder.constant(frequency, "float32")])
    return ctx.builder.op("Cos", [angle]), ctx.builder.op("Sin", [angle])


def _rotate(ctx: Context, node: fx.Node) -> Lowered:
    """RotaryEmbedding (ONNX 23) in its flat form, half-split, with the table of this chunk."""
    x, cos, sin = (node_arg(node, index) for index in range(3))
    dtype = dtype_name(tensor_value(x))
    table = [ctx.value(part) for part in (cos, sin)]
    if dtype != "float32":
        table = [ctx.builder.op("Cast", [part], to=int(DTYPES[dtype])) for part in table]
    inputs = [flat(ctx, x), *table]
    return heads(ctx, ctx.builder.op("RotaryEmbedding", inputs, num_heads=heads_of(x)), node)


def cache_rows(ctx: Context, new: fx.Node, cache: fx.Node, start: fx.Node) -> ir.Value:
    """A linear cache [B, G, C, D] with the chunk's rows [B, S, G, D] from slot ``start`` on.

    All S rows are written, padding and those of an idle sequence too. They lie beyond the sequence's end, where
    no mask looks and later tokens are written; but ``start + S <= C`` must hold for every sequence.
    """
    rows = ctx.builder.op("Transpose", [ctx.value(new)], perm=[0, 2, 1, 3])
    return ctx.builder.op("TensorScatter", [ctx.value(cache), rows, ctx.value(start)], axis=2, mode="linear")


def attention_inputs(ctx: Context, node: fx.Node) -> tuple[list[ir.Value], float]:
    """Queries, keys, values, perhaps a mask, of a scaled_dot_product_attention, and its scale."""
    q, k, v = (node_arg(node, index) for index in range(3))
    mask, scale = argument(node, 3, "attn_mask"), argument(node, 6, "scale")
    if argument(node, 4, "dropout_p", 0.0) != 0.0 or argument(node, 5, "is_causal", False):
        raise ExportError(f"node `{node.name}`: attention with dropout or an implied causal mask cannot be lowered")
    factor = scale if isinstance(scale, float) else tensor_value(q).shape[-1] ** -0.5
    inputs = [ctx.value(q), ctx.value(k), ctx.value(v)] + ([ctx.value(mask)] if mask is not None else [])
    return inputs, float(factor)


RULES: dict[object, Rule] = {
    gemma3c.rotary_table.default: _rotary_table,
    gemma3c.rotate.default: _rotate,
}
