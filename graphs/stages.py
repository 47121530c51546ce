"""The stages that every target compiles, and their contracts: names, dtypes and shapes.

Legend: B batch, S tokens in the chunk, R rows of logits, L slots of a local layer, C context, M image feature rows,
N images, T tokens an image, H hidden of the decoder, V vocabulary, G key-value heads, D head_dim, W window.

A dimension is an int, or a symbol that stays dynamic in the graph. The caches of layer i enter as
``cache.i.k`` and ``cache.i.v`` and leave as ``cache.i.k.out`` and ``cache.i.v.out``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StageName = Literal["decoder", "decoder_image", "vision"]
Dim = int | str


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a stage: a name, a dtype as numpy spells it, and dimensions."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a layer keeps: ``slots`` is ``"L"`` for a local layer (its window, and a slack where the target's
    layout profits from one) and ``"C"`` for a global one (the context); a number where the target wants it static."""

    kv_heads: int
    slots: Dim
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The numbers of a decoder that its contract depends on."""

    hidden_size: int
    vocab_size: int
    caches: tuple[CacheShape, ...]
    cache_dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """The numbers of a vision tower that its contract depends on."""

    image_size: int
    tokens_per_image: int
    text_hidden_size: int
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage's name and the tensors that go in and come out, in order."""

    name: StageName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def decoder_stage(shape: DecoderShape, *, image: bool, name: StageName | None = None) -> Stage:
    """Token ids and caches to logits and caches; with ``image`` also image features and where they go.

    ``name`` is for a target whose one decoder serves text and images; without it one for images is `decoder_image`.

    ``start`` is the position of each sequence's first token, ``length`` how many of its S tokens
    are real, ``rows`` which rows of the chunk to give logits for. ``feature_rows`` and
    ``image_ids`` hold -1 at text. A chunk never cuts an image.
    """
    inputs = [
        TensorSpec(name="token_ids", dtype="int64", shape=("B", "S")),
        TensorSpec(name="start", dtype="int64", shape=("B",)),
        TensorSpec(name="length", dtype="int64", shape=("B",)),
        TensorSpec(name="rows", dtype="int64", shape=("B", "R")),
    ]
    caches = [
        TensorSpec(
            name=f"cache.{layer}.{part}",
            dtype=shape.cache_dtype,
            shape=("B", cache.kv_heads, cache.slots, cache.head_dim),
        )
        for layer, cache in enumerate(shape.caches)
        for part in ("k", "v")
    ]
    inputs += caches
    if image:
        inputs += [
            TensorSpec(name="features", dtype=shape.cache_dtype, shape=("M", shape.hidden_size)),
            TensorSpec(name="feature_rows", dtype="int64", shape=("B", "S")),
            TensorSpec(name="image_ids", dtype="int64", shape=("B", "S")),
        ]
    outputs = [TensorSpec(name="logits", dtype="float32", shape=("B", "R", shape.vocab_size))]
    outputs += [TensorSpec(name=f"{c.name}.out", dtype=c.dtype, shape=c.shape) for c in caches]
    name = name or ("decoder_image" if image else "decoder")
    return Stage(name=name, inputs=tuple(inputs), outputs=tuple(outputs))


def vision_stage(shape: VisionShape) -> Stage:
    """Normalised pixels to image features in the decoder's hidden size."""
    pixels = TensorSpec(name="pixels", dtype=shape.dtype, shape=("N", 3, shape.image_size, shape.image_size))
    features = TensorSpec(
        name="features", dtype=shape.dtype, shape=("N", shape.tokens_per_image, shape.text_hidden_size)
    )
    return Stage(name="vision", inputs=(pixels,), outputs=(features,))
