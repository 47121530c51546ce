"""What the ``trt`` dialect's attention must know of a chunk, computed once in a graph.

Legend: B batch, S tokens in the chunk, C slots of a linear cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import fx

from graphs.onnx_lowering.builder import DTYPES
from graphs.onnx_lowering.context import Context

INT32 = int(DTYPES["int32"])


@dataclass(frozen=True, kw_only=True)
class ChunkNumbers:
    """int32 values of the graph, named ``chunk.start`` and so on.

    ``filled`` [B] counts the slots of a linear cache that hold something after the chunk, 1 at least, so that what an
    idle sequence computes stays finite. ``newest`` [B] is the position of each sequence's last token, ``start + length - 1``. ``visible_end`` [B, S] is the
    end, exclusive and counted in the chunk, of the keys that a token sees: one past its own, or the end of its image.
    """

    start: ir.Value
    length: ir.Value
    filled: ir.Value
    newest: ir.Value
    visible_end: ir.Value


def chunk_numbers(ctx: Context, q: fx.Node, start: fx.Node, length: fx.Node, image_ids: object) -> ChunkNumbers:
    """The numbers of the chunk whose queries [B, S, N, D] are ``q``; ``image_ids`` None: all text."""
    b = ctx.builder
    starts, lengths = (b.op("Cast", [ctx.value(x)], to=INT32) for x in (start, length))
    end = b.op("Add", [starts, lengths])
    tokens = ctx.dimension(q, 1)
    own = b.op("Add", [_numbered(ctx, tokens), b.constant(1, "int32")])
    if image_ids is None:
        ends = b.op("Expand", [own, b.op("Concat", [ctx.dimension(q, 0), tokens], axis=0)])
    else:
        ends = _image_ends(ctx, ctx.value(image_ids), own)
    one = b.constant(1, "int32")
    numbers = {"start": starts, "length": lengths, "visible_end": ends}
    numbers |= {"filled": b.op("Max", [end, one]), "newest": b.op("Sub", [end, one])}
    return ChunkNumbers(**{name: b.named(value, f"chunk.{name}") for name, value in numbers.items()})


def _numbered(ctx: Context, size: ir.Value) -> ir.Value:
    """0, 1, ... ``size`` - 1 as int32."""
    b = ctx.builder
    limit = b.op("Squeeze", [b.op("Cast", [size], to=INT32)])
    return b.op("Range", [b.constant(0, "int32"), limit, b.constant(1, "int32")])


def _image_ends(ctx: Context, image_ids: ir.Value, own: ir.Value) -> ir.Value:
    """The largest end among the tokens of the same image, of which a text token has none but itself: [B, S]."""
    b = ctx.builder
    ids = b.op("Cast", [image_ids], to=INT32)
    column, row = (b.op("Unsqueeze", [ids, b.constant([axis], "int64")]) for axis in (2, 1))
    together = b.op("And", [b.op("Equal", [column, row]), b.op("GreaterOrEqual", [column, b.constant(0, "int32")])])
    reach = b.op("Where", [together, own, b.constant(0, "int32")])
    return b.op("Max", [b.op("ReduceMax", [reach, b.constant([2], "int64")], keepdims=0), own])


def linear_mask(ctx: Context, chunk: ChunkNumbers, k_cache: fx.Node) -> ir.Value:
    """Which slots of a linear cache each token sees: bool [B, 1, S, C]; slot 0 at least."""
    b = ctx.builder
    first = b.op("Unsqueeze", [chunk.start, b.constant([1], "int64")])
    end = b.op("Unsqueeze", [b.op("Add", [first, chunk.visible_end]), b.constant([1, 3], "int64")])
    return b.op("Less", [_numbered(ctx, ctx.dimension(k_cache, 2)), end])
