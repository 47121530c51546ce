"""How far one layer's work is from what it should be, where, and what that looks like.

Legend: S tokens (or patches), H hidden, W window.

    drift_s = max(0, rms_H(actual_s - expected_s) - floor_s) / rms_H(expected_s - before_s)

The error at a token is held against what the layer adds there, since the residual stream itself may be thousands of
times larger. ``floor_s`` is what fp32 cannot hold of the stream: a few units in its last place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LAST_PLACES = 4 * float(np.finfo(np.float32).eps)
_SHARE = 0.05
"""A token drifts where its error is above this share of the worst."""

Errors = NDArray[np.float64]


def drift(before_SH: Tensor, expected_SH: Tensor, actual_SH: Tensor) -> Errors:
    """[S]; see the module's docstring. Infinite where a value is not finite."""
    before, expected, actual = (x.double() for x in (before_SH, expected_SH, actual_SH))
    added = (expected - before).square().mean(-1).sqrt()
    floor = _LAST_PLACES * expected.square().mean(-1).sqrt()
    error = ((actual - expected).square().mean(-1).sqrt() - floor).clamp(min=0)
    relative = torch.where(error == 0, 0.0, error / added)
    return np.asarray(torch.where(relative.isfinite(), relative, torch.inf).flatten().numpy(), dtype=np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Drift:
    """Errors of one layer over everything that a stage was fed.

    Args:
        errors: [S], token after token.
        positions: [S], where each token stands in its passage.
        is_image: [S], whether it belongs to a picture.
        first_chunk: [S], whether its piece begins its passage.
        finite: whether all that the layer gave is finite.
    """

    errors: Errors
    positions: NDArray[np.int64]
    is_image: NDArray[np.bool_]
    first_chunk: NDArray[np.bool_]
    finite: bool = True

    @property
    def worst(self) -> float:
        """The largest error."""
        return float(self.errors.max(initial=0.0))


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a drift looks like: where it is, in words, and the cause that such a place suggests."""

    where: str
    cause: str
    suggestion: str


def look(found: Drift, *, kind: str, first_of_kind: bool, window: int) -> Look:
    """Reads a drift that no hypothesis explained.

    Args:
        kind: of the layer, ``local`` or ``global``.
        first_of_kind: whether layers of the other kind before it are sound.
        window: W of the local layers.
    """
    if not found.finite or not np.isfinite(found.errors).all():
        return Look(
            where="the layer gives NaN or infinite values",
            cause="overflow",
            suggestion="a value left the range of its dtype: float16 holds 65,504 at most, and Gemma 3 goes beyond",
        )
    bad = found.errors > _SHARE * found.worst
    where = _where(found, bad)
    if found.is_image.any() and not bad[~found.is_image].any():
        return Look(
            where=where, cause="image mask", suggestion="only tokens of pictures drift: their mask or their place"
        )
    if bad.any() and not bad[found.first_chunk].any():
        return Look(where=where, cause="cache", suggestion="no first chunk drifts: what a chunk reads from the caches")
    if kind == "local" and not bad[found.positions < window].any():
        return Look(where=where, cause="window", suggestion=f"nothing drifts before position {window}: the window")
    if first_of_kind and kind == "global" and _grows(found):
        return Look(where=where, cause="rope scale", suggestion="the drift of a global layer grows with the position")
    if bad[found.positions == 0].any():
        return Look(
            where=where,
            cause="norm, weights or feed-forward",
            suggestion="position 0 drifts, where attention sees one token only: no matter of mask or rotation",
        )
    return Look(where=where, cause="attention", suggestion="position 0 is sound: rotation, mask or attention scale")


def _where(found: Drift, bad: NDArray[np.bool_]) -> str:
    places = np.unique(found.positions[bad])
    share = f"{int(bad.sum())} of {len(bad)} tokens"
    return f"{share} drift, the first at position {places[0]}" if len(places) else "no token drifts"


def _grows(found: Drift) -> bool:
    """Whether errors rise with the position: position 0 is sound, and the later half is worse than the earlier."""
    order = np.argsort(found.positions, kind="stable")
    errors = found.errors[order]
    at_start = found.errors[found.positions == 0]
    half = len(errors) // 2
    earlier, later = np.median(errors[:half]), np.median(errors[half:])
    return bool(at_start.max(initial=0.0) < _SHARE * found.worst and later > earlier)


def gathered(parts: Sequence[Drift]) -> Drift:
    """Several drifts of one layer as one."""
    return Drift(
        errors=np.concatenate([part.errors for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        is_image=np.concatenate([part.is_image for part in parts]),
        first_chunk=np.concatenate([part.first_chunk for part in parts]),
        finite=all(part.finite for part in parts),
    )
