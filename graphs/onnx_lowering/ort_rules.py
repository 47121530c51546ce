"""Rules of the ``ort`` dialect: ONNX Runtime's own fused operators where it has them.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, C context, W window.

References: ONNX Runtime's contrib operators (GroupQueryAttention, MatMulNBits,
GatherBlockQuantized, FusedMatMul, SkipSimplifiedLayerNormalization); ONNX 1.20 RotaryEmbedding,
RMSNormalization, TensorScatter.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch
from torch import fx

from autotune.kernels import global_attention as global_kernel
from autotune.kernels import siglip_pool as pool_kernel
from autotune.kernels import sliding_window_attention as window_kernel
from graphs.node_args import argument, float_arg, int_arg, ints_arg, node_arg, only_arguments
from graphs.onnx_lowering.attention_rules import attention_inputs, cache_rows, flat, heads, heads_of
from graphs.onnx_lowering.builder import DTYPES, MICROSOFT
from graphs.onnx_lowering.context import Context, Lowered, OrtOptions, Rule
from graphs.onnx_lowering.inline import Inliner
from graphs.ops import gemma3c
from graphs.weights import BlockFormat, Weight
from runtimes.errors import ExportError

aten = torch.ops.aten

INT8_ACTIVATIONS = 4
"""MatMulNBits' ``accuracy_level`` for int8 activations: the only one with fast kernels for 4 and 8 bits on CPUs."""


def _group_query_attention(ctx: Context, node: fx.Node, window: int | None, scale: float) -> Lowered:
    """com.microsoft GroupQueryAttention; local layers use its compact window cache."""
    b, to_int32 = ctx.builder, int(DTYPES["int32"])
    q, k, v, k_cache, v_cache, start, length = (node_arg(node, index) for index in range(7))
    end = b.op("Add", [ctx.value(start), ctx.value(length)])
    newest = b.op("Sub", [end, b.constant(1, "int64")])
    newest = b.op("Max", [newest, b.constant(0, "int64")])  # -1 in a sequence that is empty and idle
    last = b.op("Cast", [newest], to=to_int32)
    furthest = b.op(
        "Max", [b.op("ReduceMax", [end], keepdims=1), ctx.dimension(q, 1)]
    )  # at least the chunk, padding too
    total = b.op("Cast", [b.op("Squeeze", [furthest])], to=to_int32)
    inputs: list[ir.Value | None] = [flat(ctx, q), flat(ctx, k), flat(ctx, v)]
    inputs += [ctx.value(k_cache), ctx.value(v_cache), last, total]
    inputs += [None] * 9 + [b.op("Cast", [ctx.value(length)], to=to_int32)]
    local = {"local_window_size": window, "sliding_window_cache": 1} if window is not None else {}
    out, k_after, v_after = b.multi(
        "GroupQueryAttention",
        inputs,
        3,
        domain=MICROSOFT,
        num_heads=heads_of(q),
        kv_num_heads=heads_of(k),
        scale=scale,
        **local,
    )
    return heads(ctx, out, q), k_after, v_after


def _sliding_window_attention(ctx: Context, node: fx.Node) -> Lowered:
    """Text: GroupQueryAttention. With images: the oracle over the compact layout, inlined."""
    window, scale = int_arg(node, 8), float_arg(node, 9)
    if argument(node, 7) is None:
        return _group_query_attention(ctx, node, window, scale)
    body = partial(window_kernel.sliding_window_attention, window=window, scale=scale, layout="compact")
    return INLINER.lower(ctx, ("window", window, scale), body, [node_arg(node, index) for index in range(8)])


def _global_attention(ctx: Context, node: fx.Node) -> Lowered:
    """Text: GroupQueryAttention. With images: TensorScatter into the cache, then the oracle's attention, inlined."""
    scale = float_arg(node, 8)
    if argument(node, 7) is None:
        return _group_query_attention(ctx, node, None, scale)
    q, k, v, k_cache, v_cache, start, length, image_ids = (node_arg(node, index) for index in range(8))
    after = [cache_rows(ctx, new, cache, start) for new, cache in ((k, k_cache), (v, v_cache))]
    arguments = (q, k_cache, v_cache, start, length, image_ids)
    values = [ctx.value(q), *after, *(ctx.value(x) for x in (start, length, image_ids))]
    body = partial(global_kernel.attend, scale=scale)
    (out,) = INLINER.lower(ctx, ("global", scale), body, arguments, values)
    return out, after[0], after[1]


def _sdpa(ctx: Context, node: fx.Node) -> Lowered:
    """ONNX Attention (opset 24) over [B, N, S, D], grouped heads and a boolean mask as they come."""
    inputs, scale = attention_inputs(ctx, node)
    return ctx.builder.op("Attention", inputs, scale=scale)


def _siglip_pool(ctx: Context, node: fx.Node) -> Lowered:
    """The oracle, inlined: AveragePool and RMSNormalization."""
    pool, eps = int_arg(node, 2), float_arg(node, 3)
    body = partial(pool_kernel.siglip_pool, pool=pool, eps=eps)
    return INLINER.lower(ctx, ("pool", pool, eps), body, [node_arg(node, 0), node_arg(node, 1)])[0]


def _rms_norm(ctx: Context, node: fx.Node) -> Lowered:
    inputs = [ctx.value(node_arg(node, 0)), ctx.value(node_arg(node, 2))]
    return ctx.builder.op("RMSNormalization", inputs, axis=-1, epsilon=float_arg(node, 3))


def _add_rms_norm(ctx: Context, node: fx.Node) -> Lowered:
    normed, _, _, total = ctx.builder.multi(
        "SkipSimplifiedLayerNormalization",
        [ctx.value(node_arg(node, index)) for index in range(3)],
        (True, False, False, True),
        domain=MICROSOFT,
        epsilon=float_arg(node, 3),
    )
    return normed, total


def _embedding(ctx: Context, node: fx.Node) -> Lowered:
    """Gather, or GatherBlockQuantized over the very bytes that the tied head multiplies by."""
    table, ids = node_arg(node, 0), node_arg(node, 1)
    weight = ctx.weight(table)
    if weight is None or weight.format is None:
        return ctx.builder.op("Gather", [ctx.value(table), ctx.value(ids)], axis=0)
    form = weight.format
    if form.zero_points == "minimum" or weight.shape[1] % form.block_size:
        raise ExportError(f"`{weight.name}`: an embedding in {form} cannot be looked up by ONNX Runtime")
    entries = {entry.part: entry for entry in weight.stored()}
    data = ctx.builder.weight(entries["codes"], (weight.shape[0], weight.shape[1] * form.bits // 8))
    inputs = [data, ctx.value(ids), ctx.builder.weight(entries["scales"])]
    if "zeros" in entries:
        inputs.append(ctx.builder.weight(entries["zeros"]))
    return ctx.builder.op(
        "GatherBlockQuantized",
        inputs,
        domain=MICROSOFT,
        bits=form.bits,
        block_size=form.block_size,
        gather_axis=0,
        quantize_axis=1,
    )


def _linear(ctx: Context, node: fx.Node) -> Lowered:
    """MatMulNBits for a quantised weight; else FusedMatMul with the weight as the checkpoint has it, [N, K]."""
    x, parameter, bias = node_arg(node, 0), node_arg(node, 1), argument(node, 2, "bias")
    weight = ctx.weight(parameter)
    if weight is not None and weight.format is not None:
        out = _matmul_nbits(ctx, ctx.value(x), weight, weight.format)
    else:
        out = ctx.builder.op("FusedMatMul", [ctx.value(x), ctx.value(parameter)], domain=MICROSOFT, transB=1)
    return out if bias is None else ctx.builder.op("Add", [out, ctx.value(bias)])


def _matmul_nbits(ctx: Context, x: ir.Value, weight: Weight, form: BlockFormat) -> ir.Value:
    """y = x @ ((code - zero) * scale).T; a minimum enters as a product with the sums of x over each block."""
    b, (rows, columns) = ctx.builder, weight.shape
    entries = {entry.part: b.weight(entry) for entry in weight.stored()}
    assert isinstance(ctx.options, OrtOptions)
    both = ctx.options.activations == "int16"
    out = b.op(
        "MatMulNBits",
        [
            _int8_and_rest(ctx, x, columns, form.block_size) if both else x,
            entries["codes"],
            entries["scales"],
            *([entries["zeros"]] if "zeros" in entries else []),
        ],
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=form.bits,
        block_size=form.block_size,
        accuracy_level=INT8_ACTIVATIONS,
    )
    if both:
        out = b.op("Add", b.multi("Split", [out], 2, axis=1, num_outputs=2))
    if form.zero_points != "minimum":
        return out
    if columns % form.block_size:
        raise ExportError(f"`{weight.name}`: {columns} columns do not fill blocks of {form.block_size}")
    blocks = b.op("Reshape", [x, b.constant([0, 0, form.blocks(columns), form.block_size], "int64")])
    sums = b.op("ReduceSum", [blocks, b.constant([-1], "int64")], keepdims=0)
    shift = b.op("FusedMatMul", [sums, entries["minimums"]], domain=MICROSOFT, transB=1)
    return b.op("Sub", [out, shift])


def _int8_and_rest(ctx: Context, x: ir.Value, columns: int, block_size: int) -> ir.Value:
    """[B, S, K] to [B, 2 S, K]: x rounded to int8 in blocks, as MatMulNBits does it, then what that leaves over."""
    key = (x, block_size)
    if key in ctx.split:
        return ctx.split[key]
    b, blocks = ctx.builder, -(-columns // block_size)
    fill = blocks * block_size - columns
    padded = b.op("Pad", [x, b.constant([0, 0, 0, 0, 0, fill], "int64")]) if fill else x
    grid = b.op("Reshape", [padded, b.constant([0, 0, blocks, block_size], "int64")])
    peak = b.op("ReduceMax", [b.op("Abs", [grid]), b.constant([-1], "int64")], keepdims=1)
    step = b.op("Max", [b.op("Mul", [peak, b.constant(1 / 127, "float32")]), b.constant(1e-30, "float32")])
    rounded = b.op("Mul", [b.op("Round", [b.op("Div", [grid, step])]), step])
    whole = b.op("Reshape", [rounded, b.constant([0, 0, blocks * block_size], "int64")])
    if fill:
        ends = [b.constant([v], "int64") for v in (0, columns, -1)]
        whole = b.op("Slice", [whole, *ends])
    ctx.split[key] = b.op("Concat", [whole, b.op("Sub", [x, whole])], axis=1)
    return ctx.split[key]


def _conv2d(ctx: Context, node: fx.Node) -> Lowered:
    only_arguments(node, 4)
    inputs = [ctx.value(node_arg(node, index)) for index in (0, 1, 2)]
    return ctx.builder.op("Conv", inputs, strides=ints_arg(node, 3))


INLINER = Inliner()

RULES: dict[object, Rule] = {
    gemma3c.sliding_window_attention.default: _sliding_window_attention,
    gemma3c.global_attention.default: _global_attention,
    gemma3c.siglip_pool.default: _siglip_pool,
    gemma3c.add_rms_norm.default: _add_rms_norm,
    aten.rms_norm.default: _rms_norm,
    aten.scaled_dot_product_attention.default: _sdpa,
    aten.embedding.default: _embedding,
    aten.linear.default: _linear,
    aten.conv2d.default: _conv2d,
}
