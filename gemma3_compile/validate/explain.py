"""Choosing among hypotheses by what is left of the error when each is taken for true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma3_compile.validate.tolerances import GRAPH

_TIE = 10.0
"""A hypothesis within this factor of the best fits as well; the one that stands first is taken."""


@dataclass(frozen=True)
class Trial:
    """A hypothesis that was tried, and the error that it leaves. ``hypothesis`` is the object itself."""

    cause: str
    sentence: str
    error: float
    hypothesis: object


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The hypothesis that fits: the error falls from ``before`` to ``after``."""

    cause: str
    sentence: str
    before: float
    after: float
    hypothesis: object


def best(trials: Sequence[Trial], before: float) -> Explanation | None:
    """The trial that leaves an error within the tolerance of graphs; the first of the table among equals.

    None where no trial does: half an explanation is none.
    """
    limit = GRAPH.relative
    assert limit is not None
    least = min((trial.error for trial in trials), default=float("inf"))
    if not least <= limit:
        return None
    chosen = next(trial for trial in trials if trial.error <= min(limit, _TIE * least))
    return Explanation(
        cause=chosen.cause,
        sentence=chosen.sentence,
        before=before,
        after=chosen.error,
        hypothesis=chosen.hypothesis,
    )
