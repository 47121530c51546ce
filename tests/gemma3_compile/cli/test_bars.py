"""Progress: bars at a terminal, silence in a pipe."""

from __future__ import annotations

import io
import sys

import pytest

from gemma3_compile.cli.bars import Bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_label_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Bars().task("hashing weights", total=2_000_000, unit="bytes") as advance:
        advance(1_000_000)
        advance(1_000_000)
    assert "hashing weights" in screen.getvalue()
    assert "B/s" in screen.getvalue()


def test_a_pipe_sees_no_bar_but_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    bars = Bars()
    with bars.task("hashing", total=2) as advance:
        advance(2)
    bars.note("int8 was chosen")
    assert pipe.getvalue() == "int8 was chosen\n"


def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bars = Bars(quiet=True)
    with bars.task("hashing", total=2) as advance:
        advance(2)
    bars.note("x")
    assert screen.getvalue() == ""
