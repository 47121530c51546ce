"""A plan from an ONNX file, built in a process of its own.

    built = build_plan(folder, PlanRequest(onnx="a.onnx", plan="a.plan", flavour="rtx", architectures=(80, 120), …))
    built.report.network.layers["PLUGIN_V3"], built.seconds, built.peak_rss_bytes

A process, since TensorRT aborts where it meets what it did not expect, and since only a fresh one gives the same bytes each
time. What it printed is kept where it failed, and only then.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from graphs.trt.build_worker import REFUSAL, REPORT, REQUEST, PlanRequest, Refusal
from graphs.trt.network import NodeError
from graphs.trt.report import BuiltPlan
from runtimes import records
from runtimes.errors import ExportError

__all__ = ["LIMIT_S", "PlanRequest", "build_plan"]

T = TypeVar("T")
LIMIT_S = 3600.0
"""How long a build may take. The 12B takes seconds with its weights as inputs, and minutes with constants."""
_LAST_LINES = 5
_SIZES = "graphs/onnx_lowering/context.py"
"""What reads a dimension of a graph's input."""
_WORKER = "graphs.trt.build_worker"
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HOME", "LD_LIBRARY_PATH", "PATH", "TMPDIR")
"""What the worker gets of this process's environment, beside PYTHONPATH."""
_FIXED = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""numpy's threads, which do nothing there, would take memory at a moment of their own choice, and so move all that follows."""


def build_plan(folder: Path, request: PlanRequest, *, limit_s: float = LIMIT_S) -> BuiltPlan:
    """Builds the plan and writes it to ``request.plan`` in ``folder``; there is no such file after an error.

    Raises:
        ExportError: the parser or the builder refuses, or the process crashed, was killed or hung. The message names the
            node and the file that emitted it where TensorRT names a node, and the log.
    """
    with tempfile.TemporaryDirectory(prefix="gemma3c-plan-") as name:
        talk = Path(name)
        (talk / REQUEST).write_text(json.dumps(records.to_json(request)), encoding="utf-8")
        log = talk / "log.txt"
        try:
            ending = _run(folder, talk, log, limit_s)
            refusal = _read(Refusal, talk / REFUSAL)
            if refusal is not None:
                raise ExportError(_refused(refusal, _kept(log)), hint=refusal.hint)
            built = _read(BuiltPlan, talk / REPORT)
            if ending is not None or built is None:
                raise _crash(request.onnx, ending or "it wrote no report", _kept(log))
        except BaseException:
            (folder / request.plan).unlink(missing_ok=True)
            raise
        return built


def emitted_by(node: str) -> str | None:
    """The file that emitted an ONNX node, by its name: ``linear_3/MatMul`` is of the rule of the FX node ``linear_3``."""
    before, _, op = node.partition("/")
    stem = re.sub(r"(_default|_overload)?(_\d+)?$", "", before)
    return _modules().get(stem) or (_SIZES if op.startswith("Shape") else None)


@cache
def _modules() -> dict[str, str]:
    """The file of each rule by the name that torch gives to nodes of its op."""
    from graphs.onnx_lowering.lower import TRT_RULES  # and with it torch, which the worker does without

    names = {"chunk": "graphs/onnx_lowering/trt_chunk.py"}
    for op, rule in TRT_RULES.items():
        _, _, qualified = (
            str(op).partition(".") if hasattr(op, "_schema") else ("", "", getattr(op, "__name__", str(op)))
        )
        names.setdefault(qualified.partition(".")[0], f"{rule.__module__.replace('.', '/')}.py")
    return names


def _run(folder: Path, talk: Path, log: Path, limit_s: float) -> str | None:
    """Runs the worker; None where it ended well, else how it ended."""
    with log.open("wb") as output, _worker(folder, talk, output.fileno()) as process:
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"it was not done within {limit_s:.0f} s"
    if code == 0:
        return None
    return f"it ended with {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"


@contextmanager
def _worker(folder: Path, talk: Path, output: int) -> Iterator[subprocess.Popen[bytes]]:
    """The worker, which does not outlive the block. What it is given is as much the same as can be, for the same bytes."""
    root = str(Path(__file__).parents[2])
    inherited = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    paths = dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", _WORKER, str(talk)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**inherited, **_FIXED, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # an interrupt at the terminal is this process's to handle
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def _kept(log: Path) -> Path:
    """The log in a place where it stays."""
    handle, name = tempfile.mkstemp(prefix="gemma3c-tensorrt-", suffix=".log")
    with os.fdopen(handle, "wb") as copy:
        copy.write(log.read_bytes())
    return Path(name)


def _read(cls: type[T], path: Path) -> T | None:
    return records.from_json(cls, json.loads(path.read_text()), where=path.name) if path.exists() else None


def _refused(refusal: Refusal, log: Path) -> str:
    lines = [refusal.message]
    lines += [f"  {_named(node)}" for node in refusal.nodes[:_LAST_LINES] if node.node]
    if not refusal.nodes:
        lines += _last_lines(log)
    return "\n".join([*lines, f"the whole log: {log}"])


def _named(node: NodeError) -> str:
    file = emitted_by(node.node)
    return f"{node.node} ({node.op}){f', emitted by {file}' if file else ''}"


def _crash(graph: str, ending: str, log: Path) -> ExportError:
    lines = [f"TensorRT's builder failed on {graph}: {ending}", *_last_lines(log), f"the whole log: {log}"]
    killed = "SIGKILL" in ending
    hint = "the system kills a process that takes too much memory; weights as inputs take little" if killed else None
    return ExportError("\n".join(lines), hint=hint)


def _last_lines(log: Path) -> list[str]:
    lines = log.read_bytes()[-8192:].decode(errors="replace").strip().splitlines()
    return [f"  | {line[:300]}" for line in lines[-_LAST_LINES:]] or ["  | (it printed nothing)"]
