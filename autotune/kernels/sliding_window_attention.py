"""Attention of local layers: a window of W tokens, the query counted, over a cache of W slots.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, W window.

    out_s = softmax_j(scale * q_s . k_j) v_j    over keys j with position p_j such that
    (p_j <= p_s or the tokens belong to one image) and p_j > p_s - W

Source: Gemma 3 report (arXiv 2503.19786), section 2; the image rule is transformers'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.kernels.cache_layout import Layout, kept_rows_BC, slot_positions_BC, take_rows


def sliding_window_attention(
    q_BSND: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    k_cache_BGWD: Tensor,
    v_cache_BGWD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    image_ids_BS: Tensor | None,
    window: int,
    scale: float,
    layout: Layout = "ring",
) -> tuple[Tensor, Tensor, Tensor]:
    """The torch oracle; returns the output [B, S, N, D] and both caches after the chunk.

    Args:
        start_B: int64, position of the chunk's first token in each sequence.
        length_B: int64, how many of the S tokens are real; the rest is padding whose output
            means nothing and that never enters the cache. 0 leaves a sequence as it is.
        image_ids_BS: int64, which image a token belongs to, -1 for text. None: all text.
            An image lies within one chunk.
        window: W. The caches have exactly W slots (the compact layout may have more), whose unwritten
            rows must be finite.
    """
    chunk, slots = q_BSND.shape[1], k_cache_BGWD.shape[2]
    step_S = torch.arange(chunk, device=q_BSND.device)
    query_BS = start_B[:, None] + step_S
    cached_BW = slot_positions_BC(start_B, window, slots, layout)
    key_BK = torch.cat([cached_BW, query_BS], dim=1)
    q_BS1, k_B1K = query_BS[:, :, None], key_BK[:, None, :]
    visible_BSK = k_B1K <= q_BS1
    if image_ids_BS is not None:
        key_image_BK = torch.cat([torch.full_like(cached_BW, -1), image_ids_BS], dim=1)
        same_BSK = key_image_BK[:, None, :] == image_ids_BS[:, :, None]
        visible_BSK = visible_BSK | (same_BSK & (image_ids_BS >= 0)[:, :, None])
    end_B11 = (start_B + length_B)[:, None, None]
    visible_BSK = visible_BSK & (k_B1K > q_BS1 - window) & (k_B1K >= 0) & (k_B1K < end_B11)
    padding_BS1 = (step_S[None, :] >= length_B[:, None])[:, :, None]
    mask_B1SK = (visible_BSK | padding_BS1)[:, None]  # a padding row sees all, so that it stays finite

    k_BGKD = torch.cat([k_cache_BGWD, k_BSGD.transpose(1, 2)], dim=2)
    v_BGKD = torch.cat([v_cache_BGWD, v_BSGD.transpose(1, 2)], dim=2)
    out_BNSD = F.scaled_dot_product_attention(
        q_BSND.transpose(1, 2), k_BGKD, v_BGKD, attn_mask=mask_B1SK, scale=scale, enable_gqa=True
    )
    rows_BW = kept_rows_BC(start_B, length_B, window, slots, layout)
    return out_BNSD.transpose(1, 2).contiguous(), take_rows(k_BGKD, rows_BW), take_rows(v_BGKD, rows_BW)
