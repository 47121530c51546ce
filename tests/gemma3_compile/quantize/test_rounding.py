"""Plain rounding in blocks, and the search for a block's scale."""

from __future__ import annotations

import pytest
import torch

from gemma3_compile.quantize.rounding import dequantize, fit_grid, in_blocks, quantize_rtn

GRIDS = [(8, False), (8, True), (4, False), (4, True)]


def weights(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "zero_points"), GRIDS)
def test_every_weight_inside_the_grid_is_within_half_a_step(bits: int, zero_points: bool) -> None:
    w = weights()
    codes, scales, zeros = quantize_rtn(w, bits, 32, zero_points)
    assert codes.dtype == torch.uint8 and codes.shape == w.shape and int(codes.max()) < 2**bits
    assert scales.shape == (24, 3) and (zeros is not None) == zero_points
    step = scales.repeat_interleave(32, dim=1)
    inside = (codes > 0) & (codes < 2**bits - 1)
    error = (dequantize(codes, scales, zeros, bits, 32) - w).abs()
    assert inside.float().mean() > 0.8
    assert bool((error <= step * 0.5001)[inside].all())


@pytest.mark.parametrize(("bits", "zero_points"), [(8, False), (4, True)])
def test_weights_that_lie_on_the_grid_come_back(bits: int, zero_points: bool) -> None:
    codes = torch.randint(1, 2**bits, (8, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    codes[:, ::32] = 2**bits - 1  # the range is used in full ...
    if zero_points:
        codes[:, 1::32] = 0  # ... on both sides
    scales = torch.rand(8, 2, generator=torch.Generator().manual_seed(2)) + 0.5
    zeros = torch.full((8, 2), 5, dtype=torch.uint8) if zero_points else None
    w = dequantize(codes, scales, zeros, bits, 32)
    found_codes, found_scales, found_zeros = quantize_rtn(w, bits, 32, zero_points)
    assert torch.equal(found_codes, codes)
    torch.testing.assert_close(dequantize(found_codes, found_scales, found_zeros, bits, 32), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_points", [False, True])
def test_clipping_is_taken_where_it_pays(zero_points: bool) -> None:
    w = weights()
    w[:, ::32] = 1.0
    w[0, 0] = 5.0  # one large weight in a block of small ones
    codes, scales, zeros = quantize_rtn(w, 4, 32, zero_points)
    clipped = (dequantize(codes, scales, zeros, 4, 32) - w).square().sum()
    blocks = in_blocks(w, 32)
    span = blocks.amax(-1) - blocks.amin(-1) if zero_points else 2 * blocks.abs().amax(-1)
    assert bool((scales <= span / (15 if zero_points else 14) * 1.0001).all())
    assert bool((scales < span / (15 if zero_points else 14) * 0.96).any()), "no block was clipped"
    assert clipped < (w - _full_range(w, zero_points)).square().sum()


def _full_range(w: torch.Tensor, zero_points: bool) -> torch.Tensor:
    blocks = in_blocks(w, 32)
    if zero_points:
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale).round()
    else:
        scale = blocks.abs().amax(-1, keepdim=True) / 7
        zero = torch.full_like(scale, 8)
    return (((blocks / scale).round() + zero).clamp(0, 15) - zero).mul(scale).flatten(1)


def test_what_a_column_counts_moves_the_grid() -> None:
    w = weights()
    w[:, 0] = 6.0
    careless = torch.ones(3, 32)
    careful = careless.clone()
    careful[0, 0] = 1e4  # the large weight matters most: its block must not clip it
    blocks = in_blocks(w, 32)
    assert bool((fit_grid(blocks, 4, True, careful)[0][:, 0] > fit_grid(blocks, 4, True, careless)[0][:, 0]).any())


def test_a_short_last_block_keeps_its_columns() -> None:
    w = weights(columns=70)
    codes, scales, zeros = quantize_rtn(w, 8, 32, False)
    assert codes.shape == (24, 70) and scales.shape == (24, 3)
    assert float((dequantize(codes, scales, zeros, 8, 32) - w).abs().max()) <= float(scales.max())


@pytest.mark.parametrize(("bits", "zero_points"), GRIDS)
@pytest.mark.parametrize("value", [0.0, 2.0, -3.0])
def test_blocks_of_one_value(bits: int, zero_points: bool, value: float) -> None:
    w = torch.full((2, 32), value)
    codes, scales, zeros = quantize_rtn(w, bits, 32, zero_points)
    torch.testing.assert_close(dequantize(codes, scales, zeros, bits, 32), w)


@pytest.mark.parametrize(("bits", "zero_points"), GRIDS)
def test_rows_do_not_depend_on_their_neighbours(bits: int, zero_points: bool) -> None:
    w = weights()
    whole = quantize_rtn(w, bits, 32, zero_points)
    top = quantize_rtn(w[:5], bits, 32, zero_points)
    for part, all_rows in zip(top, whole, strict=True):
        assert (part is None) == (all_rows is None)
        assert part is None or torch.equal(part, all_rows[:5])
