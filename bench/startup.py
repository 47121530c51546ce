"""How long things take to start, with a warm file cache: medians over fresh processes.

First token: from the start of the process until the first piece of text is there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench import real_270m
from bench.record import BAR, ROOT, Row, finish, less_is_better, options

PROMPT = "A compiler is a program that"
_IMPORT = "import time; t = time.perf_counter(); import runtimes; print(time.perf_counter() - t)"
_FIRST_TOKEN = """
import sys, runtimes
engine = runtimes.load(sys.argv[1], threads=2)
print(next(iter(engine.stream(sys.argv[2], raw=True, max_tokens=8))), flush=True)
sys.stdin.read()
"""


def to_first_line(command: list[str]) -> float:
    """Seconds from the start of a process to its first line; it then waits for its input to end."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.communicate("")
    if process.returncode or not line:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    return seconds


def to_exit(command: list[str]) -> float:
    """Seconds that a process takes."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def reported(command: list[str]) -> float:
    """The seconds that a process prints."""
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def console_script() -> list[str]:
    """``gemma3c`` as a shell finds it, or its module where the project is not installed."""
    path = Path(sys.executable).with_name("gemma3c")
    return [str(path)] if path.exists() else [sys.executable, "-m", "gemma3_compile"]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--reuse", action="store_true", help="take the bundles of an earlier run")
    given = parser.parse_args()
    repeats = 2 if given.quick else 11
    python, rows = sys.executable, list[Row]()

    def row(case: str, metric: str, timed: list[float], bar_s: float) -> None:
        # The first run brings files into the cache.
        rows.append(less_is_better(case, metric, "ms", median(timed[1:]) * 1e3, BAR, bar_s * 1e3))

    runs = range(repeats + 1)
    row("import runtimes", "within the process", [reported([python, "-c", _IMPORT]) for _ in runs], 0.15)
    row("gemma3c --help", "whole process", [to_exit([*console_script(), "--help"]) for _ in runs], 0.3)
    for dtype, words in (("auto", "kept grid"), ("int4", "int4")):
        bundle = str(real_270m.bundle(dtype, reuse=given.reuse))
        command = [python, "-c", _FIRST_TOKEN, bundle, PROMPT]
        row(f"270m {words}", "Python to first token", [to_first_line(command) for _ in runs], 1.5)
        command = [*console_script(), "run", bundle, PROMPT, "--raw", "--max-tokens", "1", "--temperature", "0"]
        row(f"270m {words}", "gemma3c run of one token, whole process", [to_exit(command) for _ in runs], 1.5)
    finish("startup", rows, quick=given.quick)


if __name__ == "__main__":
    main()
