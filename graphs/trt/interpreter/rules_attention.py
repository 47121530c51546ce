"""Attention, its caches, and the rotary embedding.

Legend: B batch, N query heads, G key-value heads, S tokens, L slots, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphs.trt.interpreter.rule import Call, Rule

_ATTENTION: Mapping[str, tuple[object, ...]] = {
    "causal": (False,), "causal_kind": ("NONE",), "norm_op": ("SOFTMAX",), "query_form": ("PADDED_BHND",),
    "key_value_form": ("PADDED_BHND",), "query_lengths": (None,), "normalization_quantize_scale": (None,),
    "num_ranks": (1,),
}  # fmt: skip
"""What an attention must have, as no other is known here."""
_ANY = ("decomposable", "key_value_lengths", "mask", "metadata", "name", "num_inputs", "num_outputs")
"""What else it has: inputs that the layer shows too, and what changes no number. A type of quantised probabilities counts
only where they have a scale, which none may have."""


def _rotary_embedding(call: Call) -> tuple[Tensor]:
    """RotaryEmbedding: pairs (x1, x2) of each head turned by the angle of their position and index.

        [x1 cos - x2 sin, x2 cos + x1 sin]

    Inputs: x [B, N, S, D], cos and sin [B, S, D / 2]. A pair is an element of each half, or two neighbours if
    ``interleaved``. ``rotary_embedding_dim`` 0: all D take part.
    """
    call.only_inputs(3)
    call.one_of("rotary_embedding_dim", 0)
    call.one_of("interleaved", False)
    x, cos, sin = (call.tensor(index) for index in range(3))
    cos, sin = cos[:, None].float(), sin[:, None].float()
    x1, x2 = x.float().chunk(2, dim=-1)
    return (torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype),)


def _attention(call: Call) -> tuple[Tensor]:
    """Attention, at its input boundary: softmax(Q K^T, masked) V, where head n of Q goes with head n / (N / G) of K and V.

    Inputs: Q [B, N, S, D]; K and V [B, G, L, D]; 3 a mask that stretches to [B, N, S, L], true where a key may be seen, or
    of floats that are added; 6 ``key_value_lengths`` int32 [B]: how many of the L keys there are. Nothing is scaled.
    Softmax is over the keys, in fp32; the output is rounded once.
    """
    call.only_inputs(7)
    attention = _checked(call)
    q, k, v = (call.tensor(index) for index in range(3))
    mask, lengths = call.optional(3), call.optional(6)
    if any(call.optional(index) is not None for index in (4, 5)):
        raise call.layer.refuse("the interpreter knows no inputs 4 and 5 of an attention")
    for name, index in (("mask", 3), ("key_value_lengths", 6)):
        facts = call.layer.inputs[index] if index < len(call.layer.inputs) else None
        if attention[name] != (None if facts is None else facts.name):
            raise call.layer.refuse(f"its attention's `{name}` is not its input {index}")
    if q.shape[1] % k.shape[1]:
        raise call.layer.refuse(f"{q.shape[1]} query heads do not divide by {k.shape[1]} key-value heads")
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    if lengths is not None:
        if mask is not None and mask.dtype != torch.bool:
            raise call.layer.refuse("the interpreter knows no mask of floats beside the lengths of the keys")
        longest = int(lengths.max())
        if not 0 <= int(lengths.min()) <= longest <= k.shape[2]:
            raise call.layer.refuse(f"its key_value_lengths are {lengths.tolist()}, but there are {k.shape[2]} keys")
        k, v = k[:, :, :longest], v[:, :, :longest]  # what no sequence sees is not read
        there = (torch.arange(longest) < lengths[:, None])[:, None, None]
        mask = there if mask is None else mask[..., :longest] & there
    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=1.0, enable_gqa=True)
    return (out.to(q.dtype),)


def _checked(call: Call) -> Mapping[str, Any]:
    """The attributes of the attention behind a boundary, all of which must be known."""
    attention: Mapping[str, Any] = call.attribute("attention")
    unknown = set(attention) - {*_ATTENTION, *_ANY}
    if unknown:
        raise call.layer.refuse(f"its attention has attributes that the interpreter does not know: {sorted(unknown)}")
    for name, allowed in _ATTENTION.items():
        if attention.get(name, allowed[0]) not in allowed:
            raise call.layer.refuse(f"its attention's `{name}` is {attention[name]}, but only {allowed} is known")
    return attention


def _attention_output(call: Call) -> tuple[Tensor]:
    """Attention, at its output boundary: what stands between the boundaries was computed at the first one."""
    call.only_inputs(1)
    _checked(call)
    return (call.tensor(0),)


def _kv_cache_update(call: Call) -> tuple[Tensor]:
    """KVCacheUpdate: cache[b, :, start[b] + s] = update[b, :, s] for every s, in place.

    Inputs: cache [B, G, L, D], which the output is; update [B, G, S, D]; start [B]. All S rows must fit.
    """
    call.only_inputs(3)
    call.one_of("cache_mode", "LINEAR")
    call.one_of("update_form", "PADDED_BHND")
    call.one_of("update_lengths", None)
    cache, update, starts = (call.tensor(index) for index in range(3))
    rows, slots = update.shape[2], cache.shape[2]
    for sequence, start in enumerate(starts.tolist()):
        if not 0 <= start <= slots - rows:
            raise call.layer.refuse(f"it writes {rows} rows from slot {start} on into a cache of {slots}")
        cache[sequence, :, start : start + rows] = update[sequence]
    return (cache,)


RULES: dict[str, Rule] = {
    "ROTARY_EMBEDDING": Rule(
        interface="IRotaryEmbeddingLayer",
        body=_rotary_embedding,
        attributes=("interleaved", "rotary_embedding_dim"),
    ),
    "ATTENTION_INPUT": Rule(interface="IAttentionInputLayer", body=_attention, attributes=("attention",)),
    "ATTENTION_OUTPUT": Rule(interface="IAttentionOutputLayer", body=_attention_output, attributes=("attention",)),
    "KV_CACHE_UPDATE": Rule(
        interface="IKVCacheUpdateLayer",
        body=_kv_cache_update,
        attributes=("cache_mode", "update_form", "update_lengths"),
    ),
}
