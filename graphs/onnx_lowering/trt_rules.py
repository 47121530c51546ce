"""Rules of the ``trt`` dialect: ONNX operators that TensorRT's parser knows, and two plugins.

Legend: B batch, S tokens in the chunk, N query heads, D head_dim, K inputs of a linear and M its outputs; I images,
p patches along a side of P x P pixels.

What is written out here although ONNX has an operator for it, TensorRT's parser would round: RMSNormalization (cast
down before the scale), the scale of an Attention (its root, multiplied into both sides).

References: ONNX 1.20 Attention, DequantizeLinear, TensorScatter; TensorRT's operator reference.
"""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch import fx

from graphs.node_args import argument, float_arg, ints_arg, node_arg, only_arguments, tensor_value
from graphs.onnx_lowering.attention_rules import attention_inputs, cache_rows
from graphs.onnx_lowering.builder import DTYPES
from graphs.onnx_lowering.context import Context, Lowered, Rule, TrtOptions, dtype_name
from graphs.onnx_lowering.trt_chunk import chunk_numbers, linear_mask
from graphs.ops import gemma3c
from graphs.weights import Weight
from runtimes.errors import ExportError

aten = torch.ops.aten


def _rms_norm(ctx: Context, node: fx.Node) -> Lowered:
    """x / sqrt(mean(x**2) + eps) * scale, in fp32 as the eager model has it."""
    b, x = ctx.builder, ctx.value(node_arg(node, 0))
    if tensor_value(node).dtype != torch.float32:
        raise ExportError(f"node `{node.name}`: a norm is computed in float32, but got {tensor_value(node).dtype}")
    mean = b.op("ReduceMean", [b.op("Mul", [x, x]), b.constant([-1], "int64")], keepdims=1)
    root = b.op("Sqrt", [b.op("Add", [mean, b.constant(float_arg(node, 3), "float32")])])
    normed = b.op("Mul", [x, b.op("Reciprocal", [root])])
    return b.op("Mul", [normed, ctx.value(node_arg(node, 2))])


def _scaled(ctx: Context, queries: ir.Value, scale: float, dtype: str) -> ir.Value:
    """Queries times the scale, rounded once: in their own dtype where that is exact, else in fp32."""
    b = ctx.builder
    if dtype == "float32" or math.frexp(scale)[0] == 0.5:
        return b.op("Mul", [queries, b.constant(scale, dtype)])
    wide = b.op("Mul", [b.op("Cast", [queries], to=int(DTYPES["float32"])), b.constant(scale, "float32")])
    return b.op("Cast", [wide], to=int(DTYPES[dtype]))


def _sdpa(ctx: Context, node: fx.Node) -> Lowered:
    """ONNX Attention (opset 24) over [B, N, S, D] with scale 1."""
    (queries, *rest), scale = attention_inputs(ctx, node)
    queries = _scaled(ctx, queries, scale, dtype_name(tensor_value(node)))
    return ctx.builder.op("Attention", [queries, *rest], scale=1.0)


def _global_attention(ctx: Context, node: fx.Node) -> Lowered:
    """TensorScatter into the cache, then Attention over its slots up to what each token sees.

    The mask says it all; the number of filled slots lets an implementation read no more than those.
    """
    b = ctx.builder
    q, k, v, k_cache, v_cache, start, length = (node_arg(node, index) for index in range(7))
    keys, values = (cache_rows(ctx, new, cache, start) for new, cache in ((k, k_cache), (v, v_cache)))
    chunk = chunk_numbers(ctx, q, start, length, argument(node, 7))
    queries = _scaled(ctx, ctx.value(q), float_arg(node, 8), dtype_name(tensor_value(q)))
    turned = b.op("Transpose", [queries], perm=[0, 2, 1, 3])
    filled = b.op("Cast", [chunk.filled], to=int(DTYPES["int64"]))
    inputs = [turned, keys, values, linear_mask(ctx, chunk, k_cache), None, None, filled]
    out = b.op("Attention", inputs, scale=1.0)
    return b.op("Transpose", [out], perm=[0, 2, 1, 3]), keys, values


def _scales(ctx: Context, weight: Weight) -> ir.Value:
    """The scales of a stored weight in the dtype of the graph."""
    (entry,) = (entry for entry in weight.stored() if entry.part == "scales")
    scales = ctx.builder.weight(entry)
    return scales if entry.dtype == weight.dtype else ctx.builder.op("Cast", [scales], to=int(DTYPES[weight.dtype]))


def _int4(ctx: Context, weight: Weight) -> ir.Value:
    """A weight [M, K] of int4 codes in the dtype of the graph.

    Raises:
        ExportError: TensorRT cannot read its format.
    """
    form = weight.format
    if form is None or (form.codes, form.bits) != ("signed", 4) or weight.shape[1] % form.block_size:
        raise ExportError(f"`{weight.name}`: TensorRT cannot read {weight.shape[1]} columns in {form}")
    (entry,) = (entry for entry in weight.stored() if entry.part == "codes")
    codes = ctx.builder.weight(entry, weight.shape, dtype="int4")
    return ctx.builder.op("DequantizeLinear", [codes, _scales(ctx, weight)], axis=1, block_size=form.block_size)


def _product(ctx: Context, rows: ir.Value, parameter: fx.Node) -> ir.Value:
    """Rows [T, K] times a weight [M, K] turned: [T, M], each form as TensorRT for RTX 1.7 copies no weight for it.

    With rows of two dimensions a Transpose of the weight is a flag of the product; under a batch it would be a copy in
    every step. Eight-bit codes are multiplied by as they are where they lie [K, M], and so are int4 constants. Int4
    inputs are written out in bfloat16 first, which is one pass over them where they are the left operand.
    """
    b, weight = ctx.builder, ctx.weight(parameter)
    if weight is None or weight.format is None:
        return b.op("MatMul", [rows, b.op("Transpose", [ctx.value(parameter)], perm=[1, 0])])
    if weight.format.whole_rows:
        (entry,) = (entry for entry in weight.stored() if entry.part == "codes")
        matrix = b.op("DequantizeLinear", [b.weight(entry), _scales(ctx, weight)], axis=1)
        return b.op("MatMul", [rows, matrix])
    matrix = _int4(ctx, weight)
    assert isinstance(ctx.options, TrtOptions)
    if ctx.options.weights == "constant":
        return b.op("MatMul", [rows, b.op("Transpose", [matrix], perm=[1, 0])])
    turned = b.op("MatMul", [matrix, b.op("Transpose", [rows], perm=[1, 0])])
    return b.op("Transpose", [turned], perm=[1, 0])


def _linear(ctx: Context, node: fx.Node) -> Lowered:
    """[B, S, K] to [B, S, M] as one product of B * S rows."""
    b, x, parameter, bias = ctx.builder, node_arg(node, 0), node_arg(node, 1), argument(node, 2, "bias")
    columns = int(tensor_value(x).shape[-1])
    out = _product(ctx, b.op("Reshape", [ctx.value(x), b.constant([-1, columns], "int64")]), parameter)
    if bias is not None:
        out = b.op("Add", [out, ctx.value(bias)])
    return b.op("Reshape", [out, _shape(ctx, node)])


def _shape(ctx: Context, node: fx.Node) -> ir.Value:
    """The shape of a node's value as ONNX wants it; what is not static is read from the node's first argument."""
    source, sizes = node_arg(node, 0), list(tensor_value(node).shape)
    unknown = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    if len(unknown) < 2:
        return ctx.builder.constant([size if isinstance(size, int) else -1 for size in sizes], "int64")
    dims = [ctx.dimension(source, axis) if axis in unknown else ctx.size(size) for axis, size in enumerate(sizes)]
    return ctx.builder.op("Concat", dims, axis=0)


def _embedding(ctx: Context, node: fx.Node) -> Lowered:
    """Rows of the table. Of an int4 constant TensorRT writes out those rows alone."""
    table, ids = node_arg(node, 0), ctx.value(node_arg(node, 1))
    weight = ctx.weight(table)
    quantised = weight is not None and weight.format is not None
    matrix = _int4(ctx, weight) if weight is not None and quantised else ctx.value(table)
    return ctx.builder.op("Gather", [matrix, ids], axis=0)


def _patches(ctx: Context, node: fx.Node) -> Lowered:
    """A convolution whose patches do not overlap, as a product: TensorRT takes its weight as an input then.

    [I, 3, pP, pP] -> patches [I * p*p, 3*P*P] -> times the kernel [H, 3*P*P], turned -> [I, H, p, p]
    """
    b = ctx.builder
    x, kernel, bias = (node_arg(node, index) for index in range(3))
    hidden, channels, size, width = (int(n) for n in tensor_value(kernel).shape)
    height, length = (int(n) for n in tensor_value(x).shape[2:])
    side = height // size
    only_arguments(node, 4)
    if ints_arg(node, 3) != [size, width] or size != width or height != length or height % size:
        raise ExportError(f"node `{node.name}`: only a convolution over patches side by side can be lowered")

    def shaped(value: ir.Value, *shape: int) -> ir.Value:
        return b.op("Reshape", [value, b.constant(shape, "int64")])

    cut = b.op("Transpose", [shaped(ctx.value(x), 0, channels, side, size, side, size)], perm=[0, 2, 4, 1, 3, 5])
    patches = shaped(cut, -1, channels * size * size)
    matrix = b.op("Transpose", [shaped(ctx.value(kernel), hidden, channels * size * size)], perm=[1, 0])
    rows = shaped(b.op("Add", [b.op("MatMul", [patches, matrix]), ctx.value(bias)]), -1, side * side, hidden)
    return shaped(b.op("Transpose", [rows], perm=[0, 2, 1]), 0, hidden, side, side)


RULES: dict[object, Rule] = {
    gemma3c.global_attention.default: _global_attention,
    aten.rms_norm.default: _rms_norm,
    aten.scaled_dot_product_attention.default: _sdpa,
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.conv2d.default: _patches,
}
