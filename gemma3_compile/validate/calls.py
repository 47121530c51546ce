"""One layer of the eager model at a time, called so that every part of the call can be varied.

Legend: S tokens in a piece, H hidden, M image feature rows, R rows of logits, V vocabulary.

Layer i of every case runs before layer i + 1, so one layer's weights are in memory at a time. A call is
plain frozen data: a hypothesis about a fault is ``dataclasses.replace`` on it. The modules that run are those of
``gemma3_compile.model``; what their ``forward`` does around the layers is done here once more, and a test holds
the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma3_compile.config import LayerKind, ModelConfig, TextConfig
from gemma3_compile.model.decoder import Layer, RMSNorm
from gemma3_compile.validate.weights import Weights, fill
from graphs import ops


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A chunk of one sequence, or one token of it, as a layer gets it.

    Args:
        x_SH: the residual stream; its type is that of all that is computed of it.
        start: position of its first token.
        image_ids_S: int64, -1 for text; None where the piece has no picture.
    """

    x_SH: Tensor
    start: int
    image_ids_S: Tensor | None

    def __len__(self) -> int:
        return self.x_SH.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCall:
    """A decoder layer over all pieces of one sequence, in order, from empty caches.

    Args:
        weights: the layer's state dict.
        rope_base, rope_factor: of this layer's kind.
        positions_restart: every piece begins at position 0 of the rotary table (a fault).
        forgets: every piece begins with empty caches (a fault).
        edit: is given the module before it runs.
    """

    config: TextConfig
    kind: LayerKind
    weights: Mapping[str, Tensor]
    pieces: tuple[Piece, ...]
    rope_base: float
    rope_factor: float
    positions_restart: bool = False
    forgets: bool = False
    edit: Callable[[Layer], None] | None = None

    def run(self) -> list[Tensor]:
        """The residual stream [S, H] after the layer, for each piece."""
        with torch.device("meta"):
            layer = Layer(self.config, self.kind)
        fill(layer, self.weights)
        if self.edit is not None:
            self.edit(layer)
        empty = self._empty_cache()
        cache, after = empty, []
        for piece in self.pieces:
            start = torch.tensor([piece.start])
            origin = 0 if self.positions_restart else piece.start
            position_1S = origin + torch.arange(len(piece))[None]
            table = ops.rotary_table(position_1S, self.config.head_dim, self.rope_base, self.rope_factor)
            ids = None if piece.image_ids_S is None else piece.image_ids_S[None]
            given = empty if self.forgets else cache
            x_1SH, cache = layer(piece.x_SH[None], table, given, start, torch.tensor([len(piece)]), ids)
            after.append(x_1SH[0])
        return after

    def _empty_cache(self) -> tuple[Tensor, Tensor]:
        end = max(piece.start + len(piece) for piece in self.pieces)
        slots = self.config.sliding_window if self.kind == "local" else end
        shape, dtype = (1, self.config.num_kv_heads, slots, self.config.head_dim), self.pieces[0].x_SH.dtype
        return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def with_weight(self, change: Callable[[Tensor], Tensor], *names: str) -> LayerCall:
        """The call with ``change`` applied to some weights."""
        return replace(self, weights={**self.weights, **{name: change(self.weights[name]) for name in names}})

    def with_pieces(self, change: Callable[[Piece], Piece]) -> LayerCall:
        """The call with ``change`` applied to every piece."""
        return replace(self, pieces=tuple(change(piece) for piece in self.pieces))


def layer_weights(weights: Weights, index: int) -> dict[str, Tensor]:
    """The state dict of decoder layer ``index``."""
    with torch.device("meta"):
        names = Layer(weights.config.text, "local").state_dict().keys()
    return weights.read_all(names, f"decoder.layers.{index}.")


def layer_call(config: TextConfig, index: int, weights: Mapping[str, Tensor], pieces: tuple[Piece, ...]) -> LayerCall:
    """The right call of layer ``index``."""
    kind = config.layer_kinds[index]
    base, factor = rope_of(config, kind)
    return LayerCall(config=config, kind=kind, weights=weights, pieces=pieces, rope_base=base, rope_factor=factor)


def rope_of(config: TextConfig, kind: LayerKind) -> tuple[float, float]:
    """Base and factor of the rotary embedding of one kind of layer."""
    return (config.rope_local_base, 1.0) if kind == "local" else (config.rope_global_base, config.rope_global_factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingCall:
    """What comes before the first decoder layer.

    Args:
        rows_SH: rows of the embedding table, unscaled.
        features_MH, feature_rows_S: as the stage ``decoder_image`` takes them; None for text.
    """

    rows_SH: Tensor
    scale: float
    features_MH: Tensor | None
    feature_rows_S: Tensor | None

    def run(self) -> Tensor:
        """The residual stream [S, H] before the first layer."""
        x_SH = self.rows_SH * self.scale
        if self.features_MH is None or self.feature_rows_S is None:
            return x_SH
        image_SH = self.features_MH[self.feature_rows_S.clamp(min=0)].to(x_SH.dtype)
        return torch.where((self.feature_rows_S >= 0)[:, None], image_SH, x_SH)


def embedding_scale(config: TextConfig, dtype: torch.dtype = torch.float32) -> float:
    """What embeddings are multiplied by: the root of the hidden size, rounded to the model's type."""
    return float(torch.tensor(config.embed_scale, dtype=dtype).item())


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadCall:
    """What comes after the last decoder layer: the final norm and the tied head.

    Args:
        table_VH: the embedding table.
        norm_H: the raw w of the final norm; None leaves the norm out (a fault).
        cap: logits become ``cap * tanh(logits / cap)``, as Gemma 2 has it (a fault); None: they stay.
    """

    table_VH: Tensor
    norm_H: Tensor | None
    eps: float
    x_RH: Tensor
    cap: float | None = None

    def run(self) -> Tensor:
        """fp32 logits [R, V]."""
        x_RH = self.x_RH
        if self.norm_H is not None:
            norm = RMSNorm(x_RH.shape[1], self.eps)
            fill(norm, {"weight": self.norm_H})
            x_RH = norm(x_RH)
        logits_RV = F.linear(x_RH, self.table_VH).float()
        return logits_RV if self.cap is None else self.cap * torch.tanh(logits_RV / self.cap)


class Embedding:
    """The tied table of ``weights``, which lookups and the head share; held while this lives.

    Args:
        scale_dtype: the type of the model that the table is of. One in bfloat16 multiplies embeddings by a rounded
            number, which whoever computes it in fp32 must take too.
    """

    def __init__(self, weights: Weights, scale_dtype: torch.dtype = torch.float32) -> None:
        self.config: ModelConfig = weights.config
        self.scale = embedding_scale(weights.config.text, scale_dtype)
        self.table_VH = weights.read("decoder.embed_tokens.weight")
        self.norm_H = weights.read("decoder.norm.weight")

    def lookup(
        self, token_ids_S: Tensor, features_MH: Tensor | None = None, feature_rows_S: Tensor | None = None
    ) -> EmbeddingCall:
        """The right call for these tokens."""
        return EmbeddingCall(
            rows_SH=self.table_VH[token_ids_S],
            scale=self.scale,
            features_MH=features_MH,
            feature_rows_S=feature_rows_S,
        )

    def head(self, x_RH: Tensor) -> HeadCall:
        """The right call for the residual stream after the last layer."""
        return HeadCall(table_VH=self.table_VH, norm_H=self.norm_H, eps=self.config.text.rms_norm_eps, x_RH=x_RH)
