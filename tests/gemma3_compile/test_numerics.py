"""Divergence of logits: known values, ties, and numbers that are none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gemma3_compile import numerics
from gemma3_compile.numerics import DivergenceMeter, divergence


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_equal_rows_do_not_diverge() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32)
    found = divergence(logits, logits + 3)  # a constant changes no probability
    assert found.rows == 5 and found.top1 == 1.0 and found.flip_margin_max == 0.0
    assert found.kl_max < 1e-12


def test_kl_is_that_of_the_formula_with_the_reference_first() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    found = divergence(rows(np.log(p).tolist()), rows(np.log(q).tolist()))
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert found.kl_mean == pytest.approx(expected, rel=1e-6)
    assert found.top1 == 0.0
    assert found.flip_margin_max == pytest.approx(math.log(2), rel=1e-6)
    assert found.margin_median == pytest.approx(math.log(2), rel=1e-6)


def test_a_flip_counts_by_the_lead_it_overturned() -> None:
    reference = rows([5.0, 4.9, 0.0], [5.0, 4.0, 0.0], [5.0, 4.0, 0.0])
    other = rows([4.9, 5.0, 0.0], [5.0, 4.0, 0.0], [0.0, 4.0, 5.0])
    found = divergence(reference, other)
    assert found.top1 == pytest.approx(1 / 3)
    assert found.flip_margin_max == pytest.approx(5.0)  # the last token's row took the lead over 5 logits
    assert found.margin_median == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_infinitely_far(bad: float) -> None:
    found = divergence(rows([1.0, 2.0], [1.0, 2.0]), rows([1.0, 2.0], [bad, 2.0]))
    assert found.kl_max == found.kl_mean == math.inf


def test_rows_in_parts_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    a, b = (generator.normal(size=(9, 7)).astype(np.float32) for _ in range(2))
    whole = divergence(a, b)
    monkeypatch.setattr(numerics, "_BLOCK_BYTES", 7 * 8 * 2)
    meter = DivergenceMeter()
    meter.add(a[:5], b[:5])
    meter.add(a[5:], b[5:])
    assert meter.result() == whole
