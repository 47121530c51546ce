"""The peak counts what this process held, and nothing of its parent's."""

from __future__ import annotations

import subprocess
import sys

from runtimes.peak_memory import peak_rss_bytes

PRINT = "from runtimes.peak_memory import peak_rss_bytes; {}; print(peak_rss_bytes())"
MB = 1 << 20


def peak_of(statement: str) -> int:
    done = subprocess.run([sys.executable, "-c", PRINT.format(statement)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_what_was_let_go_still_counts() -> None:
    assert peak_of("held = bytearray(b'x') * (200 << 20); del held") > 200 * MB


def test_the_parent_does_not_count() -> None:
    held = bytearray(b"x") * (300 * MB)
    mine = peak_rss_bytes()
    assert mine is not None and mine > len(held)
    assert peak_of("pass") < 100 * MB
