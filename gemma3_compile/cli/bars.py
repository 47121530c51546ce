"""Progress bars with rates on stderr; silent where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from runtimes.progress import Advance, Progress, Unit

_UNIT_NAMES: dict[Unit, str] = {"bytes": "B", "tensors": " tensors", "tokens": " tok", "steps": " steps"}


class Bars(Progress):
    """Shows each task as a tqdm bar, and each note as a line. Notes appear without a terminal too.

    Args:
        quiet: shows nothing at all.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.shown = not quiet and sys.stderr.isatty()

    @contextmanager
    def task(self, label: str, *, total: int | None = None, unit: Unit = "steps") -> Iterator[Advance]:
        if not self.shown:
            yield lambda amount: None
            return
        from tqdm import tqdm

        in_bytes = unit == "bytes"
        with tqdm(
            desc=label,
            total=total,
            unit=_UNIT_NAMES[unit],
            unit_scale=in_bytes,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
        ) as bar:

            def advance(amount: int) -> None:
                bar.update(amount)

            yield advance

    def note(self, message: str) -> None:
        if not self.quiet:
            click.echo(message, err=True)
