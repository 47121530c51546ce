"""The nodes of the ``trt`` dialect that are plugins, each with a model-local function as its fallback.

    gemma3c::SlidingWindowAttention(q [B,S,N,D], k [B,S,G,D], v [B,S,G,D], k_cache [B,G,W,D], v_cache [B,G,W,D],
        start [B], length [B], newest [B], visible_end [B,S])        -> out [B,S,N,D], k_cache_out, v_cache_out
        attributes: window, scale, kernels
    gemma3c::SigLIPPool(x [I,P,H], scale [H])                        -> out [I,T,H]
        attributes: pool, eps, kernels

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, W window; I images, P patches,
T tokens an image, H hidden of the tower. start, length, newest and visible_end are int32.

TensorRT takes the plugin where one is registered, since a node carries ``plugin_namespace``, and the function where
none is. The function is the kernel's torch oracle, traced; so a graph means the same with the plugin and without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor, fx

from autotune.kernels.siglip_pool import siglip_pool
from autotune.kernels.sliding_window_attention import sliding_window_attention
from graphs.node_args import argument, float_arg, int_arg, node_arg, tensor_value
from graphs.onnx_lowering.builder import DTYPES, Builder
from graphs.onnx_lowering.context import Context, Lowered, Rule, TrtOptions, dtype_name
from graphs.onnx_lowering.inline import Body, Inliner
from graphs.onnx_lowering.trt_chunk import chunk_numbers
from graphs.ops import gemma3c
from runtimes.errors import ExportError

DOMAIN, DOMAIN_VERSION = "gemma3c", 1
PLUGIN_VERSION = "1"
INLINER = Inliner()

Numbers = dict[str, int | float]
Build = Callable[[Context, Sequence[ir.Value]], Sequence[ir.Value]]


def plugin(
    ctx: Context,
    name: str,
    inputs: Sequence[ir.Value],
    outputs: int,
    numbers: Numbers,
    fallback: Callable[[], ir.Function],
) -> tuple[ir.Value, ...]:
    """A plugin node; ``fallback`` makes its function the first time that ``name`` occurs.

    Raises:
        ExportError: an earlier node of this name has other ``numbers``, which the function holds as constants.
    """
    assert isinstance(ctx.options, TrtOptions)
    if (DOMAIN, name) not in ctx.builder.functions:
        ctx.builder.functions[DOMAIN, name] = fallback()
    made = ctx.builder.functions[DOMAIN, name].attributes
    known = {key: made[key].value for key in numbers}
    if known != numbers:
        raise ExportError(f"{DOMAIN}::{name} occurs with {known} and with {numbers}")
    return ctx.builder.multi(
        name,
        inputs,
        outputs,
        domain=DOMAIN,
        **numbers,
        kernels=ctx.options.kernels_hash,
        plugin_version=PLUGIN_VERSION,
        plugin_namespace=DOMAIN,
    )


def _function(
    ctx: Context, name: str, inputs: Sequence[tuple[str, Tensor]], numbers: Numbers, build: Build
) -> ir.Function:
    """The function ``name`` over inputs of the given names and shapes; ``build`` makes its outputs."""
    builder = Builder()
    inner = Context(builder=builder, options=ctx.options, weights={}, rules=ctx.rules)
    builder.scope(name)
    values = [builder.input(arg, dtype_name(fake), [str(dim) for dim in fake.shape]) for arg, fake in inputs]
    outputs = build(inner, values)
    kinds = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}
    declared = {**numbers, "kernels": "", "plugin_version": PLUGIN_VERSION, "plugin_namespace": DOMAIN}
    attributes = [ir.Attr(key, kinds[type(value)], value) for key, value in declared.items()]
    return builder.function(DOMAIN, name, outputs, attributes)


def _window_function(
    ctx: Context, name: str, inputs: Sequence[tuple[str, Tensor]], window: int, scale: float
) -> ir.Function:
    """The oracle over the ring. A token's image is named by its end, which is its own for text: no two share one."""
    body: Body = partial(sliding_window_attention, window=window, scale=scale, layout="ring")

    def build(inner: Context, values: Sequence[ir.Value]) -> Sequence[ir.Value]:
        to_int64 = int(DTYPES["int64"])
        q, k, v, k_cache, v_cache, start, length, _, visible_end = values
        wide = [inner.builder.op("Cast", [x], to=to_int64) for x in (start, length, visible_end)]
        fakes = [fake for _, fake in inputs]
        fakes = [*fakes[:5], *(fakes[i].new_empty(fakes[i].shape, dtype=torch.int64) for i in (5, 6, 8))]
        return INLINER.lower_over(inner, ("window", window, scale), body, fakes, [q, k, v, k_cache, v_cache, *wide])

    return _function(ctx, name, inputs, {"window": window, "scale": scale}, build)


def _sliding_window_attention(ctx: Context, node: fx.Node) -> Lowered:
    name = "SlidingWindowAttention"
    q, k, v, k_cache, v_cache, start, length = (node_arg(node, index) for index in range(7))
    window, scale = int_arg(node, 8), float_arg(node, 9)
    slots = tensor_value(k_cache).shape[2]
    if slots != window:
        raise ExportError(f"node `{node.name}`: a ring cache has as many slots as the window, but got {slots}")
    tensors = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    chunk = chunk_numbers(ctx, q, start, length, argument(node, 7))
    one_each = tensor_value(start).new_empty(tensor_value(start).shape, dtype=torch.int32)
    tokens = one_each.new_empty(tensor_value(q).shape[:2])
    fakes = [(arg, tensor_value(x)) for arg, x in tensors.items()]
    fakes += [("start", one_each), ("length", one_each), ("newest", one_each), ("visible_end", tokens)]
    inputs = [*(ctx.value(x) for x in tensors.values()), chunk.start, chunk.length, chunk.newest, chunk.visible_end]
    numbers: Numbers = {"window": window, "scale": scale}
    return plugin(ctx, name, inputs, 3, numbers, lambda: _window_function(ctx, name, fakes, window, scale))


def _siglip_pool(ctx: Context, node: fx.Node) -> Lowered:
    name = "SigLIPPool"
    pool, eps = int_arg(node, 2), float_arg(node, 3)
    arguments = {"x": node_arg(node, 0), "scale": node_arg(node, 1)}
    fakes = {arg: tensor_value(x) for arg, x in arguments.items()}
    body: Body = partial(siglip_pool, pool=pool, eps=eps)

    def build(inner: Context, values: Sequence[ir.Value]) -> Sequence[ir.Value]:
        return INLINER.lower_over(inner, (name, pool, eps), body, list(fakes.values()), values)

    numbers: Numbers = {"pool": pool, "eps": eps}
    inputs = [ctx.value(x) for x in arguments.values()]
    return plugin(ctx, name, inputs, 1, numbers, lambda: _function(ctx, name, list(fakes.items()), numbers, build))[0]


RULES: dict[object, Rule] = {
    gemma3c.sliding_window_attention.default: _sliding_window_attention,
    gemma3c.siglip_pool.default: _siglip_pool,
}
