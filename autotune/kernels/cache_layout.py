"""Which position a cache slot holds, and where a chunk goes, for each cache layout.

Legend: B batch, S tokens in the chunk, W window, C slots of a local layer's cache.

``ring`` has exactly W slots, puts position p in slot p mod W and never moves a row. ``compact`` (ONNX
Runtime's window cache) keeps the newest positions in ascending order from row 0. It has W slots or a
few more: when all C are full it drops G = C - W + 1 positions at once, so that rows move every G tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["ring", "compact"]


def held(total: Tensor, window: int, slots: int) -> Tensor:
    """How many positions a compact cache holds after ``total`` tokens: min(T, W) at least, min(T, C) at most.

    Source: ONNX Runtime, GroupQueryAttention, "Windowed KV Cache".
    """
    dropped_at_once = slots - window + 1
    over = (total - slots).clamp(min=0)
    return total - (over + dropped_at_once - 1) // dropped_at_once * dropped_at_once


def slot_positions_BC(start_B: Tensor, window: int, slots: int, layout: Layout) -> Tensor:
    """Absolute position in every slot before a chunk that starts at ``start_B``; -1 or less: empty."""
    slot_C = torch.arange(slots, device=start_B.device)
    start_B1 = start_B[:, None]
    if layout == "ring":
        return start_B1 - 1 - torch.remainder(start_B1 - 1 - slot_C, window)
    held_B1 = held(start_B1, window, slots)
    return torch.where(slot_C < held_B1, slot_C + start_B1 - held_B1, -1)


def kept_rows_BC(start_B: Tensor, length_B: Tensor, window: int, slots: int, layout: Layout) -> Tensor:
    """Row of [cache ++ chunk] that each slot holds after ``length_B`` tokens of the chunk were added.

    A slot that holds no position yet keeps what it holds: padding rows never enter the cache.
    """
    slot_C = torch.arange(slots, device=start_B.device)
    start_B1, end_B1 = start_B[:, None], (start_B + length_B)[:, None]
    if layout == "ring":
        after_BC = end_B1 - 1 - torch.remainder(end_B1 - 1 - slot_C, window)
        return torch.where(after_BC >= start_B1, after_BC - start_B1 + slots, slot_C)
    before_B1 = start_B1 - held(start_B1, window, slots)
    after_BC = end_B1 - held(end_B1, window, slots) + slot_C
    rows_BC = torch.where(after_BC >= start_B1, after_BC - start_B1 + slots, after_BC - before_B1)
    return torch.where(after_BC < end_B1, rows_BC, slot_C)


def take_rows(rows_BGLD: Tensor, index_BK: Tensor) -> Tensor:
    """Rows ``index_BK`` of every head: [B, G, L, D] and [B, K] to [B, G, K, D]."""
    heads, dim = rows_BGLD.shape[1], rows_BGLD.shape[3]
    index_BGKD = index_BK[:, None, :, None].expand(-1, heads, -1, dim)
    return rows_BGLD.gather(2, index_BGKD)
