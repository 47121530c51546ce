"""Reading a drift: its measure, its look, and what fits it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gemma3_compile.validate.drift import Drift, drift, look
from gemma3_compile.validate.explain import Trial, best

W = 16


def drifting(where: np.ndarray, *, size: int = 48, image: slice = slice(0, 0), first: int = 20) -> Drift:
    positions = np.arange(size)
    is_image = np.zeros(size, dtype=np.bool_)
    is_image[image] = True
    return Drift(errors=where.astype(np.float64), positions=positions, is_image=is_image, first_chunk=positions < first)


def test_an_error_is_held_against_what_the_layer_adds() -> None:
    before = torch.full((2, 8), 1000.0)
    expected = before + 1.0
    actual = expected.clone()
    actual[1] += 0.5
    errors = drift(before, expected, actual)
    assert errors[0] == 0.0
    assert errors[1] == pytest.approx(0.5, rel=0.01)


def test_what_fp32_cannot_hold_of_the_stream_is_no_error() -> None:
    before = torch.full((1, 8), 1.0e6)
    expected = before + 1.0
    assert drift(before, expected, expected + 0.125)[0] == 0.0  # one unit in the last place of a million
    assert drift(before, expected, expected + 4.0)[0] > 1.0


def test_a_value_that_is_none_is_infinitely_far() -> None:
    before = torch.zeros(2, 4)
    actual = torch.ones(2, 4)
    actual[1, 2] = math.nan
    assert drift(before, torch.ones(2, 4), actual).tolist() == [0.0, math.inf]


S = np.arange(48)


@pytest.mark.parametrize(
    ("found", "kind", "cause"),
    [
        (drifting(np.where(S >= W, 0.5, 0.0)), "local", "window"),
        (drifting(S * 0.01), "global", "rope scale"),
        (drifting(np.where((S >= 20) & (S < 24), 0.5, 0.0), image=slice(20, 24)), "local", "image mask"),
        (drifting(np.where(S >= 10, 0.5, 0.0), first=10), "global", "cache"),
        (drifting(np.full(48, 0.5)), "local", "norm, weights or feed-forward"),
        (drifting(np.where(S >= 1, 0.5, 0.0)), "local", "attention"),
        (drifting(np.where(S == 3, math.inf, 0.0)), "local", "overflow"),
    ],
)
def test_the_look_of_a_drift(found: Drift, kind: str, cause: str) -> None:
    assert look(found, kind=kind, first_of_kind=True, window=W).cause == cause


def test_the_look_says_where() -> None:
    seen = look(drifting(np.where(S >= W, 0.5, 0.0)), kind="local", first_of_kind=True, window=W)
    assert seen.where == "32 of 48 tokens drift, the first at position 16"


def trial(name: str, error: float) -> Trial:
    return Trial(name, name, error, name)


def test_the_first_that_fits_is_taken_among_equals() -> None:
    chosen = best([trial("far", 0.4), trial("first", 3e-7), trial("second", 1e-7), trial("worse", 5e-5)], 0.5)
    assert chosen is not None and (chosen.cause, chosen.before, chosen.after) == ("first", 0.5, 3e-7)


def test_half_an_explanation_is_none() -> None:
    assert best([trial("near", 0.01)], 0.5) is None
    assert best([trial("nothing", math.nan)], 0.5) is None
    assert best([], 0.5) is None
