"""SigLIP pooling against float64 loops, square by square."""

from __future__ import annotations

import pytest
import torch

from autotune.kernels.siglip_pool import siglip_pool
from tests.tolerances import TOLERANCES, check, relative_error


def _expected(x_NPH: torch.Tensor, scale_H: torch.Tensor, pool: int, eps: float) -> torch.Tensor:
    images, patches, hidden = x_NPH.shape
    side = round(patches**0.5)
    grid = x_NPH.double().view(images, side, side, hidden)
    tokens = []
    for top in range(0, side, pool):
        for left in range(0, side, pool):
            tokens.append(grid[:, top : top + pool, left : left + pool].reshape(images, -1, hidden).mean(dim=1))
    pooled = torch.stack(tokens, dim=1)
    return pooled / (pooled.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * scale_H.double()


@pytest.mark.parametrize(("side", "pool"), [(4, 4), (4, 2), (4, 1), (1, 1), (9, 3), (12, 4), (64, 4)])
@pytest.mark.parametrize("hidden", [1, 5, 48])
def test_equals_float64(side: int, pool: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(side)
    x, scale = torch.randn((2, side * side, hidden), generator=generator), torch.randn(hidden, generator=generator)
    y = siglip_pool(x, scale, pool, 1e-6)
    assert y.shape == (2, (side // pool) ** 2, hidden)
    check("kernel.pool", y, _expected(x, scale, pool, 1e-6))


def test_zeros_stay_finite() -> None:
    assert not siglip_pool(torch.zeros((1, 16, 3)), torch.ones(3), 2, 1e-6).any()


def test_columns_taken_for_rows_are_caught() -> None:
    x = torch.randn((1, 36, 8), generator=torch.Generator().manual_seed(0))
    swapped = x.view(1, 6, 6, 8).transpose(1, 2).reshape(1, 36, 8)
    error = relative_error(siglip_pool(swapped, torch.ones(8), 3, 1e-6), _expected(x, torch.ones(8), 3, 1e-6))
    assert error > 1000 * TOLERANCES["kernel.pool"].relative
