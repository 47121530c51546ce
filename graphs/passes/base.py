"""What a pass is: a function over a Program that says what it changed and what it left, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from graphs.program import Program


@dataclass(kw_only=True)
class PassResult:
    """How many places a pass rewrote, and for those that looked right but were left: the reason."""

    changed: int = 0
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A named rewrite. ``run`` leaves a graph that computes the same in torch."""

    name: str
    run: Callable[[Program], PassResult]
