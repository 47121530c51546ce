"""How far two sets of logits lie apart: divergence, agreement of the likeliest token, margins.

Legend: R rows of logits, V vocabulary.

    KL(p || q) = sum_v p_v (log p_v - log q_v),  p, q = softmax of the reference's and of the other's row, in nats

Rows are worked on a few at a time in float64, so that 262,144 columns take little memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What :class:`DivergenceMeter` found over ``rows`` rows.

    ``kl_mean`` and ``kl_max`` are in nats; infinite where a row is not finite. ``top1`` is the share of rows
    whose likeliest token is the reference's. A margin is the lead, in logits of the reference, of its likeliest
    token: ``margin_median`` over the second likeliest in all rows; ``flip_margin_max`` over the token that took
    its place, the largest among the rows where one did (0 where none did). A flip with a small margin is a coin
    that fell on the other side; one with a large margin is an error.
    """

    rows: int
    kl_mean: float
    kl_max: float
    top1: float
    margin_median: float
    flip_margin_max: float


@dataclass(kw_only=True)
class DivergenceMeter:
    """Gathers rows of logits as they come. ``add`` takes [R, V] of the reference and of the other."""

    _kl: list[NDArray[np.float64]] = field(default_factory=list)
    _margins: list[NDArray[np.float64]] = field(default_factory=list)
    _flips: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, expected_RV: NDArray[np.float32], actual_RV: NDArray[np.float32]) -> None:
        """Takes in rows; the shapes must agree."""
        assert expected_RV.shape == actual_RV.shape and expected_RV.ndim == 2, (expected_RV.shape, actual_RV.shape)
        step = max(1, _BLOCK_BYTES // (8 * expected_RV.shape[1]))
        for row in range(0, len(expected_RV), step):
            self._add_block(
                expected_RV[row : row + step].astype(np.float64), actual_RV[row : row + step].astype(np.float64)
            )

    def _add_block(self, expected_RV: NDArray[np.float64], actual_RV: NDArray[np.float64]) -> None:
        top_R1 = expected_RV.argmax(axis=1)[:, None]
        other_R1 = actual_RV.argmax(axis=1)[:, None]
        lead_R = np.take_along_axis(expected_RV, top_R1, axis=1)[:, 0]
        self._flips.append(
            (lead_R - np.take_along_axis(expected_RV, other_R1, axis=1)[:, 0])[(top_R1 != other_R1)[:, 0]]
        )
        self._margins.append(lead_R - np.partition(expected_RV, -2, axis=1)[:, -2])
        finite_R = np.isfinite(actual_RV).all(axis=1) & np.isfinite(expected_RV).all(axis=1)
        kl_R = np.full(len(expected_RV), np.inf)
        log_p_RV, log_q_RV = _log_softmax(expected_RV[finite_R]), _log_softmax(actual_RV[finite_R])
        kl_R[finite_R] = (np.exp(log_p_RV) * (log_p_RV - log_q_RV)).sum(axis=1).clip(min=0.0)
        self._kl.append(kl_R)

    def result(self) -> Divergence:
        """The figures over all rows so far; there must be one."""
        kl, margins, flips = (np.concatenate(parts) for parts in (self._kl, self._margins, self._flips))
        return Divergence(
            rows=len(kl),
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            top1=1.0 - len(flips) / len(kl),
            margin_median=float(np.median(margins)),
            flip_margin_max=float(flips.max(initial=0.0)),
        )


def divergence(expected_RV: NDArray[np.float32], actual_RV: NDArray[np.float32]) -> Divergence:
    """The figures for one set of rows, [R, V] each."""
    meter = DivergenceMeter()
    meter.add(expected_RV, actual_RV)
    return meter.result()


def _log_softmax(logits_RV: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted_RV = logits_RV - logits_RV.max(axis=1, keepdims=True, initial=-np.inf)
    return np.asarray(shifted_RV - np.log(np.exp(shifted_RV).sum(axis=1, keepdims=True)))
