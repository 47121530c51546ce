"""Which position a cache slot holds, and where a chunk goes, for each cache layout.

Legend: B batch, S tokens in the chunk, W slots of a local layer's cache.

A local layer keeps exactly W slots. ``ring`` puts position p in slot p mod W and never moves a row.
``compact`` (ONNX Runtime's window cache) keeps the newest min(T, W) positions in ascending order
from row 0, so rows move once the window is full.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["ring", "compact"]


def slot_positions_BW(start_B: Tensor, window: int, layout: Layout) -> Tensor:
    """Absolute position in every slot before a chunk that starts at ``start_B``; -1 or less: empty."""
    slot_W = torch.arange(window, device=start_B.device)
    if layout == "ring":
        last_B1 = start_B[:, None] - 1
        return last_B1 - torch.remainder(last_B1 - slot_W, window)
    base_B1 = (start_B[:, None] - window).clamp(min=0)
    return torch.where(slot_W < start_B[:, None], slot_W + base_B1, -1)


def kept_rows_BW(start_B: Tensor, length_B: Tensor, window: int, chunk: int, layout: Layout) -> Tensor:
    """Row of [cache ++ chunk] that each slot holds after ``length_B`` of ``chunk`` tokens were added.

    A slot that holds no position yet keeps what it holds: padding rows never enter the cache.
    """
    slot_W = torch.arange(window, device=start_B.device)
    start_B1, end_B1 = start_B[:, None], (start_B + length_B)[:, None]
    if layout == "ring":
        after_BW = (end_B1 - 1) - torch.remainder(end_B1 - 1 - slot_W, window)
        return torch.where(after_BW >= start_B1, after_BW - start_B1 + window, slot_W)
    before_B1 = (start_B1 - window).clamp(min=0)
    after_BW = (end_B1 - window).clamp(min=0) + slot_W
    rows_BW = torch.where(after_BW >= start_B1, after_BW - start_B1 + window, after_BW - before_B1)
    return torch.where(after_BW < end_B1, rows_BW, slot_W)


def take_rows(rows_BGLD: Tensor, index_BK: Tensor) -> Tensor:
    """Rows ``index_BK`` of every head: [B, G, L, D] and [B, K] to [B, G, K, D]."""
    heads, dim = rows_BGLD.shape[1], rows_BGLD.shape[3]
    index_BGKD = index_BK[:, None, :, None].expand(-1, heads, -1, dim)
    return rows_BGLD.gather(2, index_BGKD)
