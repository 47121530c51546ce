"""The one table of tolerances: how far a number may lie from its oracle, and why that far.

A test names its row: ``check("eager.logits", ours, theirs)``. Errors are relative to the largest magnitude of
the oracle, ``max |actual - expected| / max |expected|``: logits and features are compared as a whole, so that
an entry near zero does not count for more than one that decides a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """One row. ``relative``: the largest :func:`relative_error` that passes. ``reason``: why no smaller."""

    relative: float
    reason: str


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "eager.logits": Tolerance(
            relative=1e-4,
            reason="fp32 on both sides, sums in another order through every layer; a wrong rope factor, window, mask or "
            "norm lies beyond 1e-2 (test_faults.py)",
        ),
        "eager.features": Tolerance(
            relative=1e-4, reason="fp32 on both sides, as the logits; 27 layers at most, no softmax over a vocabulary"
        ),
        "eager.chunking": Tolerance(
            relative=2e-5,
            reason="the same arithmetic with another chunk size: products of other shapes sum in another order, no more",
        ),
        "kernel.attention": Tolerance(
            relative=1e-5, reason="fp32 softmax and sums over at most some hundred keys, against float64"
        ),
        "kernel.cache": Tolerance(relative=0.0, reason="rows are moved, never computed"),
        "kernel.rotary": Tolerance(
            relative=2e-2,
            reason="a frequency is good to 1e-7 in fp32, which 131,072 positions make 1e-2 of a radian against float64; "
            "transformers computes, and the models were trained with, the same fp32 product",
        ),
        "kernel.rotary_peer": Tolerance(
            relative=0.0, reason="transformers computes the same fp32 product in the same order; every bit agrees"
        ),
        "kernel.rotary_near": Tolerance(
            relative=5e-6, reason="the same below position 32: an fp32 angle is good to 2e-6 of a radian"
        ),
        "kernel.pool": Tolerance(
            relative=1e-5,
            reason="a mean of up to 16 patches and one norm in fp32, against float64: the norm magnifies the rounding of "
            "a mean near zero",
        ),
        "graph.exact": Tolerance(relative=0.0, reason="a pass moves or renames work; no sum changes its order"),
        "graph.stacked": Tolerance(
            relative=3e-5,
            reason="stacked linears are one product of another shape, which may sum in another order: over 200 seeds up "
            "to 5e-6 in a graph of two products, and 8e-6 was seen once",
        ),
        "ort.logits": Tolerance(
            relative=2e-5,
            reason="fp32 on both sides; ONNX Runtime's attention and norms sum in their own order, through every layer",
        ),
        "ort.features": Tolerance(
            relative=1e-5, reason="fp32 on both sides through the tower; convolution and norms sum in their own order"
        ),
        "ort.quantised_product": Tolerance(
            relative=1e-5, reason="the reference rounds activations as MatMulNBits does; what differs is fp32 sums"
        ),
        "ort.int8_activations": Tolerance(
            relative=4e-2,
            reason="activations rounded to int8 in blocks: each is off by up to 1/254 of its block's peak, an outlier here",
        ),
        "ort.int16_activations": Tolerance(
            relative=3e-4, reason="a second pass multiplies what the first rounding left over, rounded to int8 in turn"
        ),
        "ort.quantised_logits": Tolerance(
            relative=2e-3, reason="int16 activations err by up to 1e-4 in each of the linears of every layer"
        ),
        "quantised.kept": Tolerance(relative=0.0, reason="codes move by a whole number, scales are copied"),
        "quantised.kept_minimum": Tolerance(
            relative=1e-6, reason="half the code range times the scale enters the minimum, which is rounded to fp32"
        ),
        "ort.rule": Tolerance(
            relative=2e-6, reason="one op in fp32 on both sides; ONNX Runtime's polynomials and sums are its own"
        ),
    }
)


def relative_error(actual: Any, expected: Any) -> float:
    """``max |actual - expected| / max |expected|`` in float64; infinite for a NaN or for shapes that differ."""
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if a.shape != e.shape or not np.isfinite(a).all() or not np.isfinite(e).all():
        return float("inf")
    difference = float(np.abs(a - e).max(initial=0.0))
    return difference / float(np.abs(e).max(initial=0.0)) if difference else 0.0


def check(row: str, actual: Any, expected: Any, what: str = "") -> None:
    """Fails the test where ``actual`` lies further from ``expected`` than the row allows."""
    error, limit = relative_error(actual, expected), TOLERANCES[row].relative
    shapes = f"shapes {tuple(np.shape(actual))} and {tuple(np.shape(expected))}"
    assert error <= limit, f"{what or row}: relative error {error:.3g} is beyond {limit:g} ({row}); {shapes}"
