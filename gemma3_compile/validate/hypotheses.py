"""Faults that a compiled decoder may have, each as a change of the eager model's own call.

Legend: S tokens of a piece, H hidden, D head_dim.

A hypothesis that makes the eager layer say what the bundle says is the cause. A new one is a row in
:data:`LAYER` or :data:`HEAD`; it must differ from the right call, or return None where it would not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3_compile.config import TextConfig
from gemma3_compile.model.decoder import MLP, Layer
from gemma3_compile.validate.calls import EmbeddingCall, HeadCall, LayerCall, Piece, rope_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """A right call of a layer over one passage; ``embedding`` is what made its input, for the first layer only."""

    call: LayerCall
    embedding: EmbeddingCall | None = None


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A possible fault of a decoder layer.

    ``vary`` gives the faulty call, or None where the fault cannot be at this site.
    """

    cause: str
    sentence: str
    vary: Callable[[Site], LayerCall | None]


NORMS = (
    "input_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _rope(base: bool, factor: bool) -> Callable[[Site], LayerCall | None]:
    """The rotary embedding with base, factor or both of the other kind of layer."""

    def vary(site: Site) -> LayerCall | None:
        call, config = site.call, site.call.config
        other_base, other_factor = rope_of(config, "global" if call.kind == "local" else "local")
        given = (other_base if base else call.rope_base, other_factor if factor else call.rope_factor)
        if given == (call.rope_base, call.rope_factor):
            return None
        return replace(call, rope_base=given[0], rope_factor=given[1])

    return vary


def _rope_inverted(site: Site) -> LayerCall | None:
    factor = site.call.rope_factor
    return None if factor == 1 else replace(site.call, rope_factor=1 / factor)


def _interleaved(site: Site) -> LayerCall:
    """q . k does not change where both are permuted alike, so even and odd lanes become the two halves."""
    dim = site.call.config.head_dim
    order = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])

    def permute(w: Tensor) -> Tensor:
        return w.reshape(-1, dim, *w.shape[1:])[:, order].reshape(w.shape)

    rows = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight")
    return site.call.with_weight(permute, *rows)


def _window(change: Callable[[int], int]) -> Callable[[Site], LayerCall | None]:
    """Another window; None where the passage cannot tell it from none at all."""

    def vary(site: Site) -> LayerCall | None:
        window = change(site.call.config.sliding_window)
        end = max(piece.start + len(piece) for piece in site.call.pieces)
        if site.call.kind == "global" or not 1 <= window < end:
            return None
        return replace(site.call, config=replace(site.call.config, sliding_window=window))

    return vary


def _other_kind(site: Site) -> LayerCall:
    return replace(site.call, kind="global" if site.call.kind == "local" else "local")


def _image_ids(change: Callable[[Tensor], Tensor]) -> Callable[[Site], LayerCall | None]:
    def vary(site: Site) -> LayerCall | None:
        pieces = site.call.pieces
        changed = [
            piece if piece.image_ids_S is None else replace(piece, image_ids_S=change(piece.image_ids_S))
            for piece in pieces
        ]
        pairs = zip(pieces, changed, strict=True)
        if all(a.image_ids_S is None or torch.equal(a.image_ids_S, b.image_ids_S) for a, b in pairs):  # type: ignore[arg-type]
            return None
        return replace(site.call, pieces=tuple(changed))

    return vary


def _scaled(scale: Callable[[TextConfig], float]) -> Callable[[Site], LayerCall | None]:
    def vary(site: Site) -> LayerCall | None:
        config = site.call.config
        scalar = scale(config)
        if abs(scalar / config.query_pre_attn_scalar - 1) < 1e-6:
            return None
        return replace(site.call, config=replace(config, query_pre_attn_scalar=scalar))

    return vary


def _heads_interleaved(site: Site) -> LayerCall | None:
    """Query head n reads key-value head n mod G instead of n // (N / G)."""
    config = site.call.config
    heads, groups, dim = config.num_heads, config.num_kv_heads, config.head_dim
    if groups in (1, heads):
        return None
    order = torch.arange(heads).view(heads // groups, groups).T.flatten()
    call = site.call.with_weight(lambda w: w.view(heads, dim, -1)[order].reshape(w.shape), "self_attn.q_proj.weight")
    return call.with_weight(lambda w: w.view(-1, heads, dim)[:, order].reshape(w.shape), "self_attn.o_proj.weight")


def _norm_without_one(*names: str) -> Callable[[Site], LayerCall]:
    return lambda site: site.call.with_weight(lambda w: w - 1.0, *(f"{name}.weight" for name in names))


def _norm_left_out(*names: str) -> Callable[[Site], LayerCall]:
    def edit(layer: Layer) -> None:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, nn.Identity())

    return lambda site: replace(site.call, edit=edit)


class _OtherMLP(nn.Module):
    """The feed-forward of ``mlp`` with another activation."""

    def __init__(self, mlp: MLP, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mlp, self.activation = mlp, activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp.down_proj(self.activation(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))
        return out


def _activation(activation: Callable[[Tensor], Tensor]) -> Callable[[Site], LayerCall]:
    def edit(layer: Layer) -> None:
        layer.add_module("mlp", _OtherMLP(layer.mlp, activation))

    return lambda site: replace(site.call, edit=edit)


def _gate_and_up_swapped(site: Site) -> LayerCall:
    gate, up = "mlp.gate_proj.weight", "mlp.up_proj.weight"
    weights = site.call.weights
    return replace(site.call, weights={**weights, gate: weights[up], up: weights[gate]})


def _embedding(change: Callable[[EmbeddingCall], EmbeddingCall | None]) -> Callable[[Site], LayerCall | None]:
    def vary(site: Site) -> LayerCall | None:
        changed = None if site.embedding is None else change(site.embedding)
        if changed is None:
            return None
        x_SH = changed.run()
        return site.call.with_pieces(lambda p: replace(p, x_SH=_share(x_SH, p)))

    return vary


def _share(x_SH: Tensor, piece: Piece) -> Tensor:
    return x_SH[piece.start : piece.start + len(piece)]


def _scale(change: Callable[[float], float]) -> Callable[[Site], LayerCall | None]:
    """Token embeddings times another number; None where it is the same."""

    def vary(call: EmbeddingCall) -> EmbeddingCall | None:
        scale = change(call.scale)
        return None if scale == call.scale else replace(call, scale=scale)

    return _embedding(vary)


def _features_scaled(call: EmbeddingCall) -> EmbeddingCall | None:
    return None if call.features_MH is None else replace(call, features_MH=call.features_MH * call.scale)


def _features_left_out(call: EmbeddingCall) -> EmbeddingCall | None:
    return None if call.features_MH is None else replace(call, features_MH=None)


def _features_first_again(call: EmbeddingCall) -> EmbeddingCall | None:
    if call.features_MH is None or call.feature_rows_S is None:
        return None
    return replace(call, feature_rows_S=call.feature_rows_S.clamp(max=0))


def _features_reversed(call: EmbeddingCall) -> EmbeddingCall | None:
    rows = call.feature_rows_S
    if call.features_MH is None or rows is None:
        return None
    return replace(call, feature_rows_S=torch.where(rows >= 0, rows.max() - rows, rows))


LAYER: tuple[Hypothesis, ...] = (
    Hypothesis(
        cause="embed scale",
        sentence="token embeddings are not multiplied by the root of the hidden size",
        vary=_scale(lambda scale: 1.0),
    ),
    Hypothesis(
        cause="embed scale",
        sentence="the embedding scale is rounded to bfloat16, as the bfloat16 model has it",
        vary=_scale(lambda scale: float(torch.tensor(scale).bfloat16())),
    ),
    Hypothesis(
        cause="embed scale",
        sentence="token embeddings are scaled twice",
        vary=_scale(lambda scale: scale * scale),
    ),
    Hypothesis(
        cause="image features",
        sentence="image features are multiplied by the embedding scale, which is for text only",
        vary=_embedding(_features_scaled),
    ),
    Hypothesis(
        cause="image features",
        sentence="image features are not put in place of the image tokens' embeddings",
        vary=_embedding(_features_left_out),
    ),
    Hypothesis(
        cause="image features",
        sentence="every image token gets the first row of features",
        vary=_embedding(_features_first_again),
    ),
    Hypothesis(
        cause="image features",
        sentence="rows of image features stand in reverse order",
        vary=_embedding(_features_reversed),
    ),
    Hypothesis(
        cause="rope scale",
        sentence="the positions are divided by the other kind's rope factor: 1 on a global layer, the global factor on a local one",
        vary=_rope(base=False, factor=True),
    ),
    Hypothesis(
        cause="rope scale",
        sentence="the positions are multiplied by the rope factor instead of divided",
        vary=_rope_inverted,
    ),
    Hypothesis(
        cause="rope base",
        sentence="the rope base is that of the other kind of layer",
        vary=_rope(base=True, factor=False),
    ),
    Hypothesis(
        cause="rope base",
        sentence="rope base and factor are those of the other kind of layer",
        vary=_rope(base=True, factor=True),
    ),
    Hypothesis(
        cause="rope",
        sentence="no rotary embedding is applied",
        vary=lambda site: replace(site.call, rope_factor=float("inf")),
    ),
    Hypothesis(cause="rope", sentence="the rotation pairs neighbouring lanes instead of halves", vary=_interleaved),
    Hypothesis(
        cause="positions",
        sentence="positions begin at 0 again in every chunk",
        vary=lambda site: replace(site.call, positions_restart=True),
    ),
    Hypothesis(cause="window", sentence="the window is one token too short", vary=_window(lambda window: window - 1)),
    Hypothesis(cause="window", sentence="the window is one token too long", vary=_window(lambda window: window + 1)),
    Hypothesis(cause="window", sentence="the window is half as long", vary=_window(lambda window: window // 2)),
    Hypothesis(cause="window", sentence="the window is twice as long", vary=_window(lambda window: window * 2)),
    Hypothesis(
        cause="window",
        sentence="the layer's attention is of the other kind: a local layer without a window, or a global one with it",
        vary=_other_kind,
    ),
    Hypothesis(
        cause="image mask",
        sentence="the mask is causal among the tokens of a picture, which must see each other both ways",
        vary=_image_ids(lambda ids: torch.full_like(ids, -1)),
    ),
    Hypothesis(
        cause="image mask",
        sentence="tokens of different pictures see each other both ways",
        vary=_image_ids(lambda ids: torch.where(ids >= 0, 0, ids)),
    ),
    Hypothesis(
        cause="image mask",
        sentence="text and picture tokens of a chunk all see each other both ways",
        vary=_image_ids(torch.zeros_like),
    ),
    Hypothesis(
        cause="cache",
        sentence="a chunk does not see what came before it",
        vary=lambda site: replace(site.call, forgets=True),
    ),
    Hypothesis(
        cause="attention scale",
        sentence="queries are scaled by the root of head_dim",
        vary=_scaled(lambda config: config.head_dim),
    ),
    Hypothesis(
        cause="attention scale",
        sentence="queries are scaled by the root of hidden size / heads",
        vary=_scaled(lambda config: config.hidden_size / config.num_heads),
    ),
    Hypothesis(
        cause="attention scale",
        sentence="products of queries and keys are not scaled",
        vary=_scaled(lambda config: 1.0),
    ),
    Hypothesis(
        cause="heads", sentence="query heads read key-value heads in turn instead of in groups", vary=_heads_interleaved
    ),
    Hypothesis(
        cause="norm (1 + w)", sentence="every norm multiplies by w instead of 1 + w", vary=_norm_without_one(*NORMS)
    ),
    *(
        Hypothesis(
            cause="norm (1 + w)", sentence=f"{name} multiplies by w instead of 1 + w", vary=_norm_without_one(name)
        )
        for name in NORMS
    ),
    Hypothesis(
        cause="norm (1 + w)",
        sentence="q_norm and k_norm multiply by w instead of 1 + w",
        vary=_norm_without_one("self_attn.q_norm", "self_attn.k_norm"),
    ),
    Hypothesis(
        cause="norm left out",
        sentence="q_norm and k_norm are left out",
        vary=_norm_left_out("self_attn.q_norm", "self_attn.k_norm"),
    ),
    *(Hypothesis(cause="norm left out", sentence=f"{name} is left out", vary=_norm_left_out(name)) for name in NORMS),
    Hypothesis(cause="activation", sentence="GELU is the exact form instead of tanh", vary=_activation(F.gelu)),
    Hypothesis(cause="activation", sentence="the activation is SiLU instead of GELU", vary=_activation(F.silu)),
    Hypothesis(
        cause="feed-forward", sentence="the activation is applied to up instead of gate", vary=_gate_and_up_swapped
    ),
)


@dataclass(frozen=True, kw_only=True)
class HeadHypothesis:
    """A possible fault after the last layer. ``vary`` gives the faulty call."""

    cause: str
    sentence: str
    vary: Callable[[HeadCall], HeadCall]


def _final_norm_without_one(call: HeadCall) -> HeadCall:
    return replace(call, norm_H=None if call.norm_H is None else call.norm_H - 1.0)


HEAD: tuple[HeadHypothesis, ...] = (
    HeadHypothesis(
        cause="norm (1 + w)", sentence="the final norm multiplies by w instead of 1 + w", vary=_final_norm_without_one
    ),
    HeadHypothesis(
        cause="norm left out", sentence="the final norm is left out", vary=lambda call: replace(call, norm_H=None)
    ),
    HeadHypothesis(
        cause="logit cap",
        sentence="logits are capped at 30, as Gemma 2 has it",
        vary=lambda call: replace(call, cap=30.0),
    ),
    HeadHypothesis(
        cause="rows",
        sentence="logits are those of the last row asked for",
        vary=lambda call: replace(call, x_RH=call.x_RH[-1:].expand_as(call.x_RH)),
    ),
)
