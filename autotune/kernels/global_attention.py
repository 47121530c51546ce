"""Attention of global layers: causal over a linear cache as long as the context.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, C context.

    out_s = softmax_j(scale * q_s . k_j) v_j    over keys j with position p_j such that
    p_j <= p_s or the tokens belong to one image

Source: Gemma 3 report (arXiv 2503.19786), section 2; the image rule is transformers'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.kernels.cache_layout import take_rows


def global_attention(
    q_BSND: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    k_cache_BGCD: Tensor,
    v_cache_BGCD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    image_ids_BS: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The torch oracle; returns the output [B, S, N, D] and both caches after the chunk.

    Position p lies in slot p of the cache. The arguments are those of
    :func:`autotune.kernels.sliding_window_attention.sliding_window_attention`.
    """
    context = k_cache_BGCD.shape[2]
    slot_C = torch.arange(context, device=q_BSND.device)
    from_chunk_BC = slot_C[None, :] - start_B[:, None]
    written_BC = (from_chunk_BC >= 0) & (from_chunk_BC < length_B[:, None])
    rows_BC = torch.where(written_BC, context + from_chunk_BC, slot_C)
    k_BGCD = take_rows(torch.cat([k_cache_BGCD, k_BSGD.transpose(1, 2)], dim=2), rows_BC)
    v_BGCD = take_rows(torch.cat([v_cache_BGCD, v_BSGD.transpose(1, 2)], dim=2), rows_BC)
    return attend(q_BSND, k_BGCD, v_BGCD, start_B, length_B, image_ids_BS, scale), k_BGCD, v_BGCD


def attend(
    q_BSND: Tensor,
    k_BGCD: Tensor,
    v_BGCD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    image_ids_BS: Tensor | None,
    scale: float,
) -> Tensor:
    """The attention alone, over caches that hold the chunk already: [B, S, N, D]."""
    chunk, context = q_BSND.shape[1], k_BGCD.shape[2]
    step_S = torch.arange(chunk, device=q_BSND.device)
    slot_C = torch.arange(context, device=q_BSND.device)
    query_BS = start_B[:, None] + step_S
    visible_BSC = slot_C[None, None, :] <= query_BS[:, :, None]
    if image_ids_BS is not None:
        from_chunk_BC = slot_C[None, :] - start_B[:, None]
        written_BC = (from_chunk_BC >= 0) & (from_chunk_BC < length_B[:, None])
        chunk_image_BC = image_ids_BS.gather(1, from_chunk_BC.clamp(0, chunk - 1))
        key_image_BC = torch.where(written_BC, chunk_image_BC, -1)
        same_BSC = key_image_BC[:, None, :] == image_ids_BS[:, :, None]
        visible_BSC = visible_BSC | (same_BSC & (image_ids_BS >= 0)[:, :, None])
    visible_BSC = visible_BSC & (slot_C < (start_B + length_B)[:, None])[:, None, :]
    padding_BS1 = (step_S[None, :] >= length_B[:, None])[:, :, None]
    mask_B1SC = (visible_BSC | padding_BS1)[:, None]  # a padding row sees all, so that it stays finite
    out_BNSD = F.scaled_dot_product_attention(
        q_BSND.transpose(1, 2), k_BGCD, v_BGCD, attn_mask=mask_B1SC, scale=scale, enable_gqa=True
    )
    return out_BNSD.transpose(1, 2).contiguous()
