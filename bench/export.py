"""What a build takes: wall time and peak memory, for ONNX Runtime or, with ``--target trt``, for TensorRT for RTX.

The weights file of the large sizes is a hole of its full size, neither written nor hashed: this times the graphs, not a
disk. Each build is a process of its own, from start to exit. For ONNX Runtime its peak is the most resident memory that
the kernel saw. A build for TensorRT starts processes that compile kernels, and one that builds each plan: its peak is the
largest sum over all of them at one time (proportional set sizes, looked at 20 times a second). No kernel is in a cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import real_270m
from bench.process_tree import PeakOfTree
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
_TRT = """
import sys
from pathlib import Path
from gemma3_compile.pipeline import BuildRequest, build
out, size, dtype, weights = sys.argv[1:]
build(BuildRequest(target="trt", flavour="rtx", out=Path(out), size=size, random_seed=0, dtype=dtype, weights=weights,
                   architectures=(80, 86, 89, 120), empty_weights=weights == "input", overwrite=True))
"""


@dataclass(frozen=True, kw_only=True)
class TrtCase:
    """A build for sm_80, 86, 89 and 120 in one plan, and the figures to reach. With constants the weights are random."""

    size: str
    dtype: str
    weights: str = "input"
    wall_s: float | None = None
    peak_gb: float | None = None
    plan_mb: float | None = None

    @property
    def name(self) -> str:
        """How rows name it."""
        return f"{self.size} {self.dtype} for TensorRT, weights as {self.weights}s"


TRT = (
    TrtCase(size="12b", dtype="bfloat16", wall_s=120, peak_gb=3, plan_mb=200),
    TrtCase(size="12b", dtype="int4", wall_s=120, peak_gb=3, plan_mb=200),
    TrtCase(size="27b", dtype="bfloat16", wall_s=180, peak_gb=4),
    TrtCase(size="27b", dtype="int4", wall_s=180, peak_gb=4),
    TrtCase(size="4b", dtype="bfloat16", weights="constant", peak_gb=24 * 2**30 / 1e9),
)


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


def trt_rows(case: TrtCase, out: Path) -> list[Row]:
    """Builds once, with no kernel in Triton's cache."""
    command = [sys.executable, "-c", _TRT, str(out), case.size, case.dtype, case.weights]
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        with PeakOfTree(command, cwd=ROOT, env={**os.environ, "TRITON_CACHE_DIR": cache}) as tree:
            code = tree.wait()
        wall = time.perf_counter() - start
    if code:
        raise RuntimeError(f"exit code {code}: {' '.join(command)}")
    plans = sum(path.stat().st_size for path in out.glob("*.plan"))
    return [
        _row(case.name, "wall", "s", wall, case.wall_s),
        _row(case.name, "peak memory of all processes", "GB", tree.peak_bytes / 1e9, case.peak_gb),
        _row(case.name, "plans", "MB", plans / 1e6, case.plan_mb),
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--target", choices=["ort", "trt"], default="ort", help="trt writes export-trt.json")
    given = parser.parse_args()
    if given.target == "trt":
        rows = []
        for case in TRT[:1] if given.quick else TRT:
            out = real_270m.WORK / f"{case.size}-trt-{case.dtype}"
            rows += trt_rows(case, out)
            shutil.rmtree(out)
        finish("export-trt", rows, quick=given.quick)
        return
    finish("export", ort_rows(quick=given.quick), quick=given.quick)


def ort_rows(*, quick: bool) -> list[Row]:
    """The 12B without its weights, and the real 270M."""
    repeats = 1 if quick else 3
    rows: list[Row] = []
    for dtype in ("float32",) if quick else ("float32", "int4"):
        out = real_270m.WORK / f"12b-{dtype}"
        case = f"12b {dtype}, weights a sparse file"
        rows += measure(case, empty_build("12b", dtype, out), repeats=repeats, wall_s=60, peak_gb=1.5)
        shutil.rmtree(out)
    for dtype, rounding in REAL[:1] if quick else REAL:
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
    return rows


if __name__ == "__main__":
    main()
