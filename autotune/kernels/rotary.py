"""Rotary position embedding in the half-split form.

Legend: B batch, S tokens, N heads, D head_dim.

    angle_i = position / factor * base ** (-2 i / D),  i < D/2
    y = [x1 cos - x2 sin, x2 cos + x1 sin],  x = [x1, x2]

Source: RoFormer (arXiv 2104.09864); linear scaling of positions (arXiv 2306.15595), which Gemma 3
applies with factor 8 on global layers from 4B up.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, base: float, factor: float, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [D/2]: what a position is multiplied by. Division by ``factor`` comes last, as in transformers."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return (1.0 / (base**exponent)) / factor


def rotary_table(position_BS: Tensor, head_dim: int, base: float, factor: float) -> tuple[Tensor, Tensor]:
    """The torch oracle: cos and sin, fp32 [B, S, D/2], of int64 positions."""
    frequency = inverse_frequencies(head_dim, base, factor, position_BS.device)
    angle = position_BS[:, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x_BSND: Tensor, cos_BSE: Tensor, sin_BSE: Tensor) -> Tensor:
    """The torch oracle: rotates every head of ``x_BSND`` by the table, in the dtype of ``x_BSND``."""
    cos, sin = cos_BSE[:, :, None].to(x_BSND.dtype), sin_BSE[:, :, None].to(x_BSND.dtype)
    x1, x2 = x_BSND.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
