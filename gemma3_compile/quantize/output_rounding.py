"""Rounding of a linear layer by what its outputs lose, given the inputs it sees.

Legend: N rows (outputs), K columns (inputs), b block size, n blocks in a row, t tokens.

For every row w of the target, codes, scales and zero points are sought that make

    sum_t weight_t ((q - w) . x_t)**2  =  (q - w) M (q - w)',   M = sum_t weight_t x_t x_t' + damping

small. First comes GPTQ: columns are rounded one after another, the most used ones first, and what a
column loses is made good by those not yet rounded. Then a few sweeps of coordinate descent go over the
blocks: a block's scale takes its best value, then every code in it, all else held.

Tensors lie transposed, [K, N], so that a column is contiguous for all rows at once.

Source: GPTQ (arXiv 2210.17323); coordinate descent as in QuantEase (arXiv 2309.01885), with the scales as coordinates too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma3_compile.blocks import Blocks
from gemma3_compile.quantize.rounding import fit_grid, in_blocks

DAMPING = 0.1
"""Added to the diagonal of M, as a share of its mean: some thousand tokens do not tell all directions apart."""
SWEEPS = 3
_CHUNK_ELEMENTS = 1 << 21
"""Weights rounded at a time: larger chunks leave the caches, and 1 << 24 took eighteen times as long."""
_SCALE_FLOOR = 0.3
"""A sweep leaves a scale alone rather than shrink it below this share of itself."""


class OutputRounding:
    """Rounds rows that see the same inputs.

    Args:
        moment_KK: fp32, sum over tokens of x x', without damping.
        bits, block_size, zero_points: the grid; see :func:`gemma3_compile.quantize.rounding.quantize_rtn`.
    """

    def __init__(
        self,
        moment_KK: Tensor,
        *,
        bits: int,
        block_size: int,
        zero_points: bool,
        damping: float = DAMPING,
        sweeps: int = SWEEPS,
    ) -> None:
        self.bits, self.block_size, self.zero_points, self.sweeps = bits, block_size, zero_points, sweeps
        self.columns = moment_KK.shape[0]
        self.moment_KK = damped(F.pad(moment_KK, (0, -self.columns % block_size) * 2), damping)
        diagonal_K = self.moment_KK.diagonal()
        self.order_K = torch.argsort(diagonal_K, descending=True, stable=True)
        use_n = diagonal_K.view(-1, block_size).sum(1)
        self.block_order_n: list[int] = torch.argsort(use_n, descending=True, stable=True).tolist()
        ordered_KK = self.moment_KK[self.order_K][:, self.order_K]
        inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(ordered_KK))
        self.factor_KK = torch.linalg.cholesky(inverse_KK, upper=True)

    def round(self, target_NK: Tensor) -> Blocks:
        """The rows' codes, scales and zero points."""
        step = max(1, _CHUNK_ELEMENTS // self.moment_KK.shape[0])
        return stacked([self._round_chunk(chunk_NK) for chunk_NK in torch.split(target_NK, step)])

    def _round_chunk(self, target_NK: Tensor) -> Blocks:
        blocks_Nnb = in_blocks(target_NK, self.block_size)
        weight_nb = self.moment_KK.diagonal().view(-1, self.block_size)
        scales_Nn, zeros_Nn = fit_grid(blocks_Nnb, self.bits, self.zero_points, weight_nb)
        target_KN, scales_nN, zeros_nN = (t.T.contiguous() for t in (blocks_Nnb.flatten(1), scales_Nn, zeros_Nn))
        codes_KN = self._feed_errors(target_KN, scales_nN, zeros_nN)
        steps_nbN = codes_KN.view(-1, self.block_size, len(target_NK)) - zeros_nN[:, None]
        values_KN = steps_nbN.mul_(scales_nN[:, None]).flatten(0, 1)
        slope_KN = self.moment_KK @ values_KN.sub_(target_KN)
        for _ in range(self.sweeps):
            for block in self.block_order_n:
                self._descend(block, codes_KN, scales_nN, zeros_nN, slope_KN)
        return Blocks(
            codes=codes_KN[: self.columns].to(torch.uint8).T.contiguous(),
            scales=scales_nN.T.contiguous(),
            zeros=zeros_nN.to(torch.uint8).T.contiguous() if self.zero_points else None,
        )

    def _feed_errors(self, target_KN: Tensor, scales_nN: Tensor, zeros_nN: Tensor) -> Tensor:
        """GPTQ on a fixed grid: the codes, as fp32 [K, N]."""
        top = 2**self.bits - 1
        columns: list[int] = self.order_K.tolist()
        rest_KN, codes_KN = target_KN[self.order_K], torch.empty_like(target_KN)
        for start in range(0, len(columns), self.block_size):
            part_bN = rest_KN[start : start + self.block_size]
            factor_bK = self.factor_KK[start : start + self.block_size, start:]
            error_bN = torch.empty_like(part_bN)
            for i, column in enumerate(columns[start : start + self.block_size]):
                scale_N, zero_N = scales_nN[column // self.block_size], zeros_nN[column // self.block_size]
                code_N = codes_KN[column]
                torch.div(part_bN[i], scale_N, out=code_N).add_(zero_N).round_().clamp_(0, top)
                torch.sub(part_bN[i], (code_N - zero_N).mul_(scale_N), out=error_bN[i]).div_(factor_bK[i, i])
                part_bN[i + 1 :].addr_(factor_bK[i, i + 1 : len(part_bN)], error_bN[i], alpha=-1.0)
            rest_KN[start + self.block_size :].addmm_(factor_bK[:, self.block_size :].T, error_bN, alpha=-1.0)
        return codes_KN

    def _descend(self, block: int, codes_KN: Tensor, scales_nN: Tensor, zeros_nN: Tensor, slope_KN: Tensor) -> None:
        """The best scale of one block, then the best code for each of its columns, in place.

        ``slope_KN`` is M (q - w), half the gradient, and is kept up to date.
        """
        rows = slice(block * self.block_size, (block + 1) * self.block_size)
        scale_N, zero_N, codes_bN = scales_nN[block], zeros_nN[block], codes_KN[rows]
        moment_bb, slope_bN = self.moment_KK[rows, rows], slope_KN[rows].clone()
        steps_bN = codes_bN - zero_N
        before_bN = steps_bN * scale_N
        bend_bN = moment_bb @ steps_bN
        change_N = (steps_bN * slope_bN).sum(0) / -(steps_bN * bend_bN).sum(0).clamp(min=1e-20)
        change_N = torch.where(scale_N + change_N > _SCALE_FLOOR * scale_N, change_N, 0.0)
        scale_N += change_N
        slope_bN.addcmul_(bend_bN, change_N)
        values_bN = steps_bN.mul_(scale_N)
        top = 2**self.bits - 1
        for i in range(self.block_size):
            wanted_N = torch.sub(values_bN[i], slope_bN[i], alpha=1.0 / float(moment_bb[i, i]))
            torch.div(wanted_N, scale_N, out=codes_bN[i]).add_(zero_N).round_().clamp_(0, top)
            value_N = (codes_bN[i] - zero_N).mul_(scale_N)
            slope_bN.addr_(moment_bb[i], value_N - values_bN[i])
            values_bN[i] = value_N
        slope_KN.addmm_(self.moment_KK[:, rows], values_bN.sub_(before_bN))


def stacked(parts: list[Blocks]) -> Blocks:
    """Rows one under another."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Blocks(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def damped(moment_KK: Tensor, damping: float = DAMPING) -> Tensor:
    """A copy with ``damping`` times the mean of the diagonal added to it, so that it can be inverted."""
    result_KK = moment_KK.clone()
    diagonal_K = result_KK.diagonal()
    diagonal_K.add_(damping * float(diagonal_K.mean()) + 1e-12)
    return result_KK
