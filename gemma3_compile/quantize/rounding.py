"""Plain rounding in blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_rtn(w: Tensor, bits: int, block_size: int, zero_points: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, columns = w.shape
    blocks = -(-columns // block_size)
    x = torch.nn.functional.pad(w, (0, blocks * block_size - columns)).view(rows, blocks, block_size)
    top = 2**bits - 1
    if zero_points:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = ((high - low) / top).clamp(min=1e-12)
        zero = (-low / scale).round().clamp(0, top)
    else:
        scale = (x.abs().amax(-1) / (2 ** (bits - 1) - 1)).clamp(min=1e-12)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    codes = ((x / scale[:, :, None]).round() + zero[:, :, None]).clamp(0, top).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns].contiguous(), scale, zero.to(torch.uint8) if zero_points else None
