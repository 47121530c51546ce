"""What a build takes: wall time and peak memory, for the 12B (weights left out) and for the real 270M.

The 12B's weights file is a hole of its full size, neither written nor hashed: this times the graphs, not a disk. Each
build is a process of its own, from start to exit, and its peak is the most resident memory that the kernel saw.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench import real_270m
from bench.record import BAR, ROOT, Row, finish, less_is_better, options

REAL = (("auto", None), ("int8", None), ("int4", "nearest"), ("int4", None), ("float32", None))
"""Data types of the real 270M, and how they are rounded where that is not the default."""

_EMPTY = """
import sys
from pathlib import Path
from gemma3_compile.pipeline import BuildRequest, build
build(BuildRequest(target="ort", out=Path(sys.argv[1]), size=sys.argv[2], random_seed=0, dtype=sys.argv[3],
                   empty_weights=True, overwrite=True))
"""


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak bytes of a process.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(
    case: str, command: list[str], *, repeats: int, wall_s: float | None = None, peak_gb: float | None = None
) -> list[Row]:
    """Rows for one build, against the bars where there are any."""
    runs = [run(command) for _ in range(repeats)]
    wall, peak = median(seconds for seconds, _ in runs), max(peak for _, peak in runs) / 1e9
    return [
        _row(case, "wall", "s", wall, wall_s),
        _row(case, "peak memory", "GB", peak, peak_gb),
    ]


def _row(case: str, metric: str, unit: str, value: float, bar: float | None) -> Row:
    if bar is None:
        return Row(case=case, metric=metric, unit=unit, value=value, note="no figure was set for this")
    return less_is_better(case, metric, unit, value, BAR, bar)


def empty_build(size: str, dtype: str, out: Path) -> list[str]:
    """The command that builds ``size`` without its weights."""
    return [sys.executable, "-c", _EMPTY, str(out), size, dtype]


def main() -> None:
    given = options(__doc__).parse_args()
    repeats = 1 if given.quick else 3
    rows: list[Row] = []
    for dtype in ("float32",) if given.quick else ("float32", "int4"):
        out = real_270m.WORK / f"12b-{dtype}"
        case = f"12b {dtype}, weights a sparse file"
        rows += measure(case, empty_build("12b", dtype, out), repeats=repeats, wall_s=60, peak_gb=1.5)
        shutil.rmtree(out)
    for dtype, rounding in REAL[:1] if given.quick else REAL:
        out = real_270m.WORK / f"270m-{dtype}-timed"
        calibrated = dtype == "int4" and rounding is None
        measured = measure(
            f"real 270m {dtype}{', calibrated' if calibrated else ''}{', to nearest' if rounding else ''}",
            real_270m.build_command(dtype, out, rounding=rounding),
            repeats=1 if calibrated else repeats,
            wall_s=None if calibrated else 30,
        )
        rows += measured
        shutil.rmtree(out)
    finish("export", rows, quick=given.quick)


if __name__ == "__main__":
    main()
