"""Weights on a grid in blocks: plain rounding, and the search for a block's scale.

Legend: N rows, K columns, b block size, n blocks in a row.

    w = (code - zero) * scale,  0 <= code < 2**bits,  one scale and one integer zero point a block
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12
_SHRINKS_FOUR_BITS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""How much of a block's range the grid spans. A narrower grid clips the largest weights and rounds the others finer."""


def quantize_rtn(w_NK: Tensor, bits: int, block_size: int, zero_points: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rounds to nearest on the grid of :func:`fit_grid`.

    Args:
        w_NK: fp32; where K is no multiple of ``block_size`` the last block is shorter.

    Returns:
        codes uint8 [N, K], scales fp32 [N, n], zeros uint8 [N, n] or None for the middle code.
    """
    columns = w_NK.shape[1]
    blocks_Nnb = in_blocks(w_NK, block_size)
    scales_Nn, zeros_Nn = fit_grid(blocks_Nnb, bits, zero_points)
    codes_Nnb = _nearest(blocks_Nnb, scales_Nn, zeros_Nn, 2**bits - 1).to(torch.uint8)
    codes_NK = codes_Nnb.flatten(1)[:, :columns].contiguous()
    return codes_NK, scales_Nn, zeros_Nn.to(torch.uint8) if zero_points else None


def dequantize(codes_NK: Tensor, scales_Nn: Tensor, zeros_Nn: Tensor | None, bits: int, block_size: int) -> Tensor:
    """The weights that codes stand for, fp32 [N, K]. ``zeros_Nn`` None means the middle code."""
    columns = codes_NK.shape[1]
    zeros = 2 ** (bits - 1) if zeros_Nn is None else zeros_Nn[:, :, None].float()
    blocks_Nnb = (in_blocks(codes_NK.float(), block_size) - zeros) * scales_Nn[:, :, None]
    return blocks_Nnb.flatten(1)[:, :columns].contiguous()


def in_blocks(w_NK: Tensor, block_size: int) -> Tensor:
    """[N, n, b]; the last block is filled up with zeros."""
    fill = -w_NK.shape[1] % block_size
    return F.pad(w_NK, (0, fill)).reshape(w_NK.shape[0], -1, block_size)


def fit_grid(
    blocks_Nnb: Tensor, bits: int, zero_points: bool, weight_nb: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, fp32 [N, n] each (zeros hold integers), with the least squared error of rounding.

    Eight bits take the block's whole range. Four bits try some narrower ranges as well.

    Args:
        weight_nb: what each column's squared error counts; None for one each.
    """
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low_Nn, high_Nn = blocks_Nnb.amin(-1).clamp(max=0.0), blocks_Nnb.amax(-1).clamp(min=0.0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in _SHRINKS_FOUR_BITS if bits == 4 else (1.0,):
        if zero_points:
            scales_Nn = ((high_Nn - low_Nn) * (shrink / top)).clamp(min=_TINY)
            zeros_Nn = (-low_Nn * shrink / scales_Nn).round().clamp(0, top)
        else:
            scales_Nn = (torch.maximum(high_Nn, -low_Nn) * (shrink / (middle - 1))).clamp(min=_TINY)
            zeros_Nn = torch.full_like(scales_Nn, middle)
        if bits != 4:
            return scales_Nn, zeros_Nn
        error_Nn = _squared_error(blocks_Nnb, scales_Nn, zeros_Nn, top, weight_nb)
        if best is None:
            best = scales_Nn, zeros_Nn, error_Nn
            continue
        better_Nn = error_Nn < best[2]
        found = (scales_Nn, zeros_Nn, error_Nn)
        scales_Nn, zeros_Nn, error_Nn = (torch.where(better_Nn, new, old) for new, old in zip(found, best, strict=True))
        best = scales_Nn, zeros_Nn, error_Nn
    assert best is not None
    return best[0], best[1]


def _nearest(blocks_Nnb: Tensor, scales_Nn: Tensor, zeros_Nn: Tensor, top: int) -> Tensor:
    return (blocks_Nnb / scales_Nn[:, :, None]).round_().add_(zeros_Nn[:, :, None]).clamp_(0, top)


def _squared_error(
    blocks_Nnb: Tensor, scales_Nn: Tensor, zeros_Nn: Tensor, top: int, weight_nb: Tensor | None
) -> Tensor:
    codes_Nnb = _nearest(blocks_Nnb, scales_Nn, zeros_Nn, top)
    error_Nnb = codes_Nnb.sub_(zeros_Nn[:, :, None]).mul_(scales_Nn[:, :, None]).sub_(blocks_Nnb).square_()
    return (error_Nnb if weight_nb is None else error_Nnb.mul_(weight_nb)).sum(-1)
