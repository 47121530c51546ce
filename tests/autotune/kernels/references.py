"""What the attention kernels must give, written the slow and obvious way: one query at a time, float64, no cache.

Legend: T tokens of a whole sequence, N query heads, G key-value heads, D head_dim, B batch, S tokens in the chunk,
W window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.kernels.cache_layout import Layout


def attention_TND(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, image_T: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """Every query of a whole sequence over the keys it may see; ``window`` None is a global layer."""
    group = q_TND.shape[1] // k_TGD.shape[1]
    q, k, v = q_TND.double(), k_TGD.double(), v_TGD.double()
    out = torch.empty_like(q)
    for query in range(q.shape[0]):
        keys = [key for key in range(q.shape[0]) if _visible(query, key, image_T, window)]
        for head in range(q.shape[1]):
            weights = torch.softmax(k[keys, head // group] @ q[query, head] * scale, dim=0)
            out[query, head] = weights @ v[keys, head // group]
    return out


def _visible(query: int, key: int, image_T: Tensor | None, window: int | None) -> bool:
    same_image = image_T is not None and image_T[query] >= 0 and image_T[query] == image_T[key]
    return bool(key <= query or same_image) and (window is None or key > query - window)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequence:
    """Random queries, keys and values of one whole sequence."""

    q_TND: Tensor
    k_TGD: Tensor
    v_TGD: Tensor

    @classmethod
    def random(cls, seed: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Sequence:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn((tokens, n, dim), generator=generator) for n in (heads, kv_heads, kv_heads))
        return cls(q_TND=q, k_TGD=k, v_TGD=v)


def cache_of(rows_TGD: Tensor, start: int, slots: int, layout: Layout | None) -> Tensor:
    """The cache [G, slots, D] after ``start`` tokens; None is a global layer's linear one. Empty slots hold 7."""
    cache = torch.full((rows_TGD.shape[1], slots, rows_TGD.shape[2]), 7.0)
    for position in range(max(0, start - slots) if layout else 0, start):
        if layout == "ring":
            slot = position % slots
        elif layout == "compact":
            slot = position - max(0, start - slots)
        else:
            slot = position
        cache[:, slot] = rows_TGD[position]
    return cache


def chunk_of(rows_TXD: Tensor, start: int, length: int, size: int) -> Tensor:
    """Rows ``start`` to ``start + length``, padded on the right to ``size`` with 9."""
    padded = torch.full((size, *rows_TXD.shape[1:]), 9.0)
    padded[:length] = rows_TXD[start : start + length]
    return padded
