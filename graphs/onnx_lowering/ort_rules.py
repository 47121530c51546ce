"""Rules of the ``ort`` dialect: ONNX Runtime's own fused operators where it has them.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, C context, W window.

References: ONNX Runtime's contrib operators (GroupQueryAttention, MultiHeadAttention, MatMulNBits,
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
from autotune.kernels.rotary import inverse_frequencies
from graphs import ops
from graphs.onnx_lowering.builder import DTYPES, MICROSOFT
from graphs.onnx_lowering.context import Context, Lowered, Rule
from graphs.onnx_lowering.inline import Inliner
from runtimes.errors import ExportError

aten = torch.ops.aten
gemma3c = torch.ops.gemma3c
assert ops  # registers the custom ops

INT8_ACTIVATIONS = 4
"""MatMulNBits' ``accuracy_level`` for int8 activations: the only one with fast kernels for 4 and 8 bits on CPUs."""


def _flat(ctx: Context, node: fx.Node) -> ir.Value:
    """[B, S, N, D] as [B, S, N * D], without a node where it came from that."""
    value = ctx.value(node)
    if value.name in ctx.flat:
        return ctx.flat[value.name]
    heads, dim = node.meta["val"].shape[2:]
    return ctx.builder.op("Reshape", [value, ctx.builder.constant([0, 0, heads * dim], "int64")])


def _heads(ctx: Context, flat: ir.Value, node: fx.Node) -> ir.Value:
    """[B, S, N * D] as [B, S, N, D], remembered by ``_flat``."""
    heads, dim = node.meta["val"].shape[2:]
    out = ctx.builder.op("Reshape", [flat, ctx.builder.constant([0, 0, heads, dim], "int64")])
    ctx.flat[out.name] = flat  # type: ignore[index]
    return out


def _rotary_table(ctx: Context, node: fx.Node) -> Lowered:
    """cos, sin of position * frequency: fp32 [B, S, D/2]."""
    position, dim, base, factor = node.args
    frequency = inverse_frequencies(dim, base, factor).numpy()  # type: ignore[arg-type]
    as_float = ctx.builder.op("Cast", [ctx.value(position)], to=int(DTYPES["float32"]))
    column = ctx.builder.op("Unsqueeze", [as_float, ctx.builder.constant([-1], "int64")])
    angle = ctx.builder.op("Mul", [column, ctx.builder.constant(frequency, "float32")])
    return ctx.builder.op("Cos", [angle]), ctx.builder.op("Sin", [angle])


def _rotate(ctx: Context, node: fx.Node) -> Lowered:
    """RotaryEmbedding (ONNX 23) in its flat form, half-split, with the table of this chunk."""
    x, cos, sin = node.args
    assert isinstance(x, fx.Node)
    inputs = [_flat(ctx, x), ctx.value(cos), ctx.value(sin)]
    flat = ctx.builder.op("RotaryEmbedding", inputs, num_heads=x.meta["val"].shape[2])
    return _heads(ctx, flat, node)


def _group_query_attention(ctx: Context, node: fx.Node, window: int | None, scale: float) -> Lowered:
    """com.microsoft GroupQueryAttention; local layers use its compact window cache."""
    b = ctx.builder
    q, k, v, k_cache, v_cache, start, length = node.args[:7]
    to_int32 = int(DTYPES["int32"])
    end = b.op("Add", [ctx.value(start), ctx.value(length)])
    newest = b.op("Max", [b.op("Sub", [end, b.constant(1, "int64")]), b.constant(0, "int64")])  # an idle, empty sequence
    last = b.op("Cast", [newest], to=to_int32)
    chunk = b.op("Shape", [ctx.value(q)], start=1, end=2)
    furthest = b.op("ReduceMax", [ctx.value(start)], keepdims=0)
    total = b.op("Cast", [b.op("Squeeze", [b.op("Add", [furthest, chunk])])], to=to_int32)
    inputs: list[ir.Value | None] = [_flat(ctx, x) for x in (q, k, v)]  # type: ignore[arg-type]
    inputs += [ctx.value(k_cache), ctx.value(v_cache), last, total]
    inputs += [None] * 9 + [b.op("Cast", [ctx.value(length)], to=to_int32)]
    shape = q.meta["val"].shape  # type: ignore[union-attr]
    local = {"local_window_size": window, "sliding_window_cache": 1} if window is not None else {}
    out, k_after, v_after = b.multi(
        "GroupQueryAttention",
        inputs,
        3,
        domain=MICROSOFT,
        num_heads=shape[2],
        kv_num_heads=k.meta["val"].shape[2],  # type: ignore[union-attr]
        scale=scale,
        **local,
    )
    heads = b.op("Reshape", [out, b.constant([0, 0, shape[2], shape[3]], "int64")])
    ctx.flat[heads.name] = out  # type: ignore[index]
    return heads, k_after, v_after


def _sliding_window_attention(ctx: Context, node: fx.Node) -> Lowered:
    """Text: GroupQueryAttention. With images: the oracle over the compact layout, inlined."""
    window, scale = node.args[8:10]
    if node.args[7] is None:
        return _group_query_attention(ctx, node, window, scale)  # type: ignore[arg-type]
    body = partial(_window_body, window=window, scale=scale)
    return INLINER.lower(ctx, ("window", window, scale), body, node.args[:8])  # type: ignore[arg-type]


def _window_body(*tensors: torch.Tensor, window: int, scale: float) -> tuple[torch.Tensor, ...]:
    return window_kernel.sliding_window_attention(*tensors, window=window, scale=scale, layout="compact")  # type: ignore[arg-type]


def _global_attention(ctx: Context, node: fx.Node) -> Lowered:
    """Text: GroupQueryAttention. With images: TensorScatter into the cache, then the oracle's attention, inlined."""
    q, k, v, k_cache, v_cache, start, length, image_ids, scale = node.args
    if image_ids is None:
        return _group_query_attention(ctx, node, None, scale)  # type: ignore[arg-type]
    b = ctx.builder
    after = []
    for new, cache in ((k, k_cache), (v, v_cache)):
        rows = b.op("Transpose", [ctx.value(new)], perm=[0, 2, 1, 3])
        after.append(b.op("TensorScatter", [ctx.value(cache), rows, ctx.value(start)], axis=2, mode="linear"))
    inputs = (q, k_cache, v_cache, start, length, image_ids)
    before = {cache: ctx.values[cache] for cache in (k_cache, v_cache)}  # type: ignore[index]
    ctx.values.update(zip((k_cache, v_cache), after, strict=True))  # type: ignore[arg-type]
    body = partial(global_kernel.attend, scale=scale)
    (out,) = INLINER.lower(ctx, ("global", scale), body, inputs)  # type: ignore[arg-type]
    ctx.values.update(before)  # type: ignore[arg-type]
    return out, after[0], after[1]  # type: ignore[return-value]


def _sdpa(ctx: Context, node: fx.Node) -> Lowered:
    """ONNX Attention (opset 24) over [B, N, S, D], grouped heads and a boolean mask as they come."""
    q, k, v = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    scale = node.kwargs.get("scale") or q.meta["val"].shape[-1] ** -0.5  # type: ignore[union-attr]
    inputs = [ctx.value(x) for x in (q, k, v)] + ([ctx.value(mask)] if mask is not None else [])
    return ctx.builder.op("Attention", inputs, scale=float(scale))  # type: ignore[arg-type]


def _siglip_pool(ctx: Context, node: fx.Node) -> Lowered:
    """The oracle, inlined: AveragePool and RMSNormalization."""
    x, scale, pool, eps = node.args
    body = partial(pool_kernel.siglip_pool, pool=pool, eps=eps)  # type: ignore[arg-type]
    return INLINER.lower(ctx, ("pool", pool, eps), body, (x, scale))[0]  # type: ignore[arg-type]


def _rms_norm(ctx: Context, node: fx.Node) -> Lowered:
    x, _, scale, eps = node.args
    return ctx.builder.op("RMSNormalization", [ctx.value(x), ctx.value(scale)], axis=-1, epsilon=eps)  # type: ignore[arg-type]


def _add_rms_norm(ctx: Context, node: fx.Node) -> Lowered:
    a, b, scale, eps = node.args
    normed, total = ctx.builder.multi(
        "SkipSimplifiedLayerNormalization",
        [ctx.value(a), ctx.value(b), ctx.value(scale)],
        (True, False, False, True),
        domain=MICROSOFT,
        epsilon=eps,  # type: ignore[arg-type]
    )[::3]
    return normed, total


def _embedding(ctx: Context, node: fx.Node) -> Lowered:
    """Gather, or GatherBlockQuantized over the very bytes that the tied head multiplies by."""
    table, ids = node.args[:2]
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
    x, parameter = node.args[:2]
    weight = ctx.weight(parameter)
    if weight is not None and weight.format is not None:
        out = _matmul_nbits(ctx, ctx.value(x), parameter)
    else:
        out = ctx.builder.op("FusedMatMul", [ctx.value(x), ctx.value(parameter)], domain=MICROSOFT, transB=1)
    if len(node.args) > 2 and node.args[2] is not None:
        out = ctx.builder.op("Add", [out, ctx.value(node.args[2])])
    return out


def _matmul_nbits(ctx: Context, x: ir.Value, parameter: object) -> ir.Value:
    """y = x @ ((code - zero) * scale).T; a minimum enters as a product with the sums of x over each block."""
    weight = ctx.weight(parameter)
    assert weight is not None and weight.format is not None
    b, form, (rows, columns) = ctx.builder, weight.format, weight.shape
    entries = {entry.part: b.weight(entry) for entry in weight.stored()}
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
    key = f"{x.name}/{block_size}"
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


def _matmul(ctx: Context, node: fx.Node) -> Lowered:
    return ctx.builder.op("MatMul", [ctx.value(node.args[0]), ctx.value(node.args[1])])


INLINER = Inliner()

RULES: dict[object, Rule] = {
    gemma3c.rotary_table.default: _rotary_table,
    gemma3c.rotate.default: _rotate,
    gemma3c.sliding_window_attention.default: _sliding_window_attention,
    gemma3c.global_attention.default: _global_attention,
    gemma3c.siglip_pool.default: _siglip_pool,
    gemma3c.add_rms_norm.default: _add_rms_norm,
    aten.rms_norm.default: _rms_norm,
    aten.scaled_dot_product_attention.default: _sdpa,
    aten.embedding.default: _embedding,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
}
