"""How long work tells of itself: a silent default here, bars in the command line.

Code that works long takes a ``Progress`` and reports to it; it never prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

Unit = Literal["bytes", "tensors", "tokens", "steps"]
Advance = Callable[[int], None]


class Progress:
    """Says nothing. A subclass shows what it is told.

    >>> with Progress().task("hashing weights.safetensors", total=1024, unit="bytes") as advance:
    ...     advance(512)
    """

    def task(self, label: str, *, total: int | None = None, unit: Unit = "steps") -> AbstractContextManager[Advance]:
        """One stretch of work. The value of the ``with`` is called with how much was done since the last call."""
        return _silent_task()

    def note(self, message: str) -> None:
        """One line worth reading: a decision that was taken, a default that was chosen."""


@contextmanager
def _silent_task() -> Iterator[Advance]:
    yield lambda amount: None


SILENT = Progress()
