"""Rounding by what the outputs lose: against plain rounding, against itself, and on odd shapes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gemma3_compile.blocks import Blocks
from gemma3_compile.quantize import output_rounding
from gemma3_compile.quantize.output_rounding import OutputRounding, damped
from gemma3_compile.quantize.rounding import dequantize, quantize_rtn


def inputs(tokens: int = 400, columns: int = 64) -> Tensor:
    """Inputs of a few directions that matter and many that hardly do, as activations are."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    return torch.randn(tokens, columns, generator=generator) @ mix.T


def weights(rows: int = 40, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


def rounding(moment: Tensor, zero_points: bool = True, sweeps: int = 3) -> OutputRounding:
    return OutputRounding(moment, bits=4, block_size=32, zero_points=zero_points, sweeps=sweeps)


def values(blocks: Blocks) -> Tensor:
    return dequantize(blocks.codes, blocks.scales, blocks.zeros, 4, 32)


def lost(w: Tensor, rounded: Tensor, moment: Tensor) -> float:
    error = rounded - w
    return float(((error @ moment) * error).sum())


@pytest.mark.parametrize("zero_points", [False, True])
def test_outputs_lose_less_than_by_rounding_to_nearest(zero_points: bool) -> None:
    x, w = inputs(), weights()
    moment = x[:300].T @ x[:300]
    fresh = x[300:].T @ x[300:]
    blocks = rounding(moment, zero_points).round(w)
    plain = dequantize(*quantize_rtn(w, 4, 32, zero_points), 4, 32)
    assert (blocks.zeros is not None) == zero_points
    assert lost(w, values(blocks), fresh) < 0.5 * lost(w, plain, fresh)


def test_where_inputs_are_all_alike_it_is_as_good_as_rounding_to_nearest() -> None:
    w = weights()
    plain = dequantize(*quantize_rtn(w, 4, 32, True), 4, 32)
    assert lost(w, values(rounding(torch.eye(64)).round(w)), torch.eye(64)) <= lost(w, plain, torch.eye(64))


def test_no_sweep_makes_it_worse() -> None:
    x, w = inputs(), weights()
    moment = x.T @ x
    losses = [lost(w, values(rounding(moment, sweeps=n).round(w)), damped(moment)) for n in range(5)]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses)), losses
    assert losses[1] < losses[0], "the first sweep finds something"


def test_after_many_sweeps_no_single_code_can_be_bettered() -> None:
    x, w = inputs(), weights(rows=6)
    moment = damped(x.T @ x)
    blocks = rounding(x.T @ x, sweeps=60).round(w)
    best = lost(w, values(blocks), moment)
    for row in range(6):
        for column in range(64):
            for step in (-1, 1):
                code = int(blocks.codes[row, column]) + step
                if 0 <= code <= 15:
                    codes = blocks.codes.clone()
                    codes[row, column] = code
                    other = values(Blocks(codes=codes, scales=blocks.scales, zeros=blocks.zeros))
                    assert lost(w, other, moment) >= best * (1 - 1e-4), (row, column, step)


def test_rows_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = inputs(), weights()
    whole = rounding(x.T @ x).round(w)
    monkeypatch.setattr(output_rounding, "_CHUNK_ELEMENTS", 64 * 7)
    cut = rounding(x.T @ x).round(w)
    share = (whole.codes == cut.codes).float().mean()
    assert share > 0.99  # products of other shapes sum in another order; a tie may fall the other way
    torch.testing.assert_close(values(whole), values(cut), rtol=0.0, atol=float(whole.scales.max()) * 1.01)


def test_columns_that_do_not_fill_the_last_block() -> None:
    x, w = inputs(columns=72), weights(columns=72)
    moment = x.T @ x
    blocks = rounding(moment).round(w)
    assert blocks.codes.shape == (40, 72) and blocks.scales.shape == (40, 3)
    assert lost(w, values(blocks), moment) < 0.5 * lost(w, dequantize(*quantize_rtn(w, 4, 32, True), 4, 32), moment)


def test_an_input_that_is_never_used_is_no_obstacle() -> None:
    x, w = inputs(), weights()
    x[:, 10:50] = 0.0
    blocks = rounding(x.T @ x).round(w)
    assert bool(values(blocks).isfinite().all()) and bool((blocks.scales > 0).all())


def test_what_comes_out_is_on_the_grid() -> None:
    x, w = inputs(), weights()
    blocks = rounding(x.T @ x).round(w)
    assert blocks.codes.dtype == torch.uint8 and int(blocks.codes.max()) <= 15
    assert blocks.zeros is not None and blocks.zeros.dtype == torch.uint8 and int(blocks.zeros.max()) <= 15
    assert blocks.scales.dtype == torch.float32
