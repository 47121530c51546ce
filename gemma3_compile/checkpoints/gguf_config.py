"""A GGUF file's metadata to a model configuration.

ggml leaves out what the Gemma 3 family has in common; those values are the family's: five local layers to one
global, local rope base 10,000, and a query scale of head_dim (of hidden / heads for the 62-layer 27b), as
llama.cpp takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma3_compile.checkpoints.gguf_header import GgufHeader
from gemma3_compile.config import LayerKind, ModelConfig, SpecialTokens, TextConfig, layer_pattern
from gemma3_compile.presets import CUSTOM, named
from runtimes.errors import CheckpointError

ARCHITECTURE = "gemma3"
_LAYERS_OF_27B = 62


class _Metadata:
    """Numbers out of the metadata, under the architecture's prefix."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata, self.source = metadata, source

    def number(self, key: str, default: float | None = None, prefix: str = ARCHITECTURE + ".") -> float:
        value = self.metadata.get(prefix + key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"{self.source}: `{prefix}{key}` must be a number, but is {'missing' if value is None else repr(value)}",
                hint="the file was not written by a converter for Gemma 3: convert it again",
            )
        return value

    def integer(self, key: str, default: int | None = None, prefix: str = ARCHITECTURE + ".") -> int:
        value = self.number(key, default, prefix)
        if not float(value).is_integer():
            raise CheckpointError(
                f"{self.source}: `{prefix}{key}` must be an integer, but is {value}",
                hint="the file is damaged or was written by a faulty converter: convert it again",
            )
        return int(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise CheckpointError(
                f"{self.source}: `{ARCHITECTURE}.{key}` must be 1 or more, but is {value}",
                hint="the file is damaged or was written by a faulty converter: convert it again",
            )
        return value


def _tokens(meta: _Metadata) -> SpecialTokens:
    """Ids from the metadata; generation also ends at every piece that is named as an end."""
    prefix = "tokenizer.ggml."
    stored = meta.metadata.get(prefix + "tokens")
    pieces: Sequence[bytes] = stored if isinstance(stored, list) else ()
    ids = [meta.integer("eos_token_id", 1, prefix), meta.integer("eot_token_id", -1, prefix)]
    ids += [pieces.index(piece) for piece in (b"<eos>", b"<end_of_turn>") if piece in pieces]
    return SpecialTokens(
        bos=meta.integer("bos_token_id", 2, prefix),
        pad=meta.integer("padding_token_id", 0, prefix),
        unk=meta.integer("unknown_token_id", 3, prefix),
        end=tuple(sorted({i for i in ids if i >= 0})),
    )


def read_config(header: GgufHeader, vocab_size: int, source: str) -> ModelConfig:
    """The configuration of a text-only Gemma 3 in a GGUF file.

    Args:
        header: the file's header.
        vocab_size: rows of the embedding, which the metadata does not hold.
        source: what to call the file in messages.

    Raises CheckpointError for another architecture or missing metadata, ConfigError for contradictions.
    """
    architecture = header.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{source}: `general.architecture` must be {ARCHITECTURE!r}, but is {architecture!r}",
            hint="gemma3c compiles Gemma 3 only; a vision tower in a GGUF of its own (mmproj) is not read",
        )
    meta = _Metadata(header.metadata, source)
    layers, heads = meta.count("block_count"), meta.count("attention.head_count")
    if layers > len(header.tensors):
        raise CheckpointError(
            f"{source}: `{ARCHITECTURE}.block_count` is {layers}, but the file holds {len(header.tensors)} tensors",
            hint="the file is damaged: fetch it again",
        )
    hidden, head_dim = meta.count("embedding_length"), meta.count("attention.key_length", 256)
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=meta.integer("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=meta.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        query_pre_attn_scalar=hidden // heads if layers == _LAYERS_OF_27B else head_dim,
        sliding_window=meta.integer("attention.sliding_window"),
        layer_kinds=_layer_kinds(meta, layers),
        max_context=meta.integer("context_length"),
        rope_local_base=meta.number("rope.freq_base_swa", 10_000.0),
        rope_global_base=meta.number("rope.freq_base", 1_000_000.0),
        rope_global_factor=_rope_factor(meta),
        # Stored as fp32: seven digits are what was meant.
        rms_norm_eps=float(f"{meta.number('attention.layer_norm_rms_epsilon', 1e-6):.7g}"),
    )
    return named(ModelConfig(name=CUSTOM, text=text, vision=None, tokens=_tokens(meta)))


def _layer_kinds(meta: _Metadata, layers: int) -> tuple[LayerKind, ...]:
    """A period, or one flag a layer that is true for local ones."""
    key = "attention.sliding_window_pattern"
    flags = meta.metadata.get(f"{ARCHITECTURE}.{key}")
    if isinstance(flags, np.ndarray):
        return tuple("local" if flag else "global" for flag in flags.tolist())
    return layer_pattern(layers, meta.count(key, 6))


def _rope_factor(meta: _Metadata) -> float:
    """What positions of global layers are divided by; ``rope.scale_linear`` is the key of old files."""
    kind = meta.metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{meta.source}: `{ARCHITECTURE}.rope.scaling.type` must be 'none' or 'linear', but is {kind!r}",
            hint="Gemma 3 scales positions linearly: convert the checkpoint again",
        )
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    return 1.0 if kind == "none" or factor == 0 else float(factor)
