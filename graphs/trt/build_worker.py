"""Builds one plan and ends: ``python -m graphs.trt.build_worker FOLDER``, which :mod:`graphs.trt.build` starts.

It runs in the folder of the graph. FOLDER is another, for ``request.json``; ``report.json`` or ``refusal.json`` is written there. All that TensorRT prints goes to
this process's output, which is the log. A process of its own, since TensorRT ends its process where it meets what it did
not expect, and since only a fresh one gives the same bytes each time: TensorRT orders the tensors between plugins and
its own code by where they happen to lie in memory. So this process asks the system for the same addresses each time, and
allocates the same: it sees files by their names in the bundle's folder, and its parent gives it few variables.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from graphs.trt.network import NodeError, ParsedNetwork, ParseError, add_profiles, describe, parse
from graphs.trt.profiles import Range
from graphs.trt.report import BuiltPlan, PlanReport
from runtimes import records
from runtimes.errors import ExportError, Gemma3CompileError
from runtimes.gpu.kernel_store import KernelStore
from runtimes.trt.binding import Flavour, load
from runtimes.trt.registry import register_plugins, take_failure

REQUEST, REPORT, REFUSAL = "request.json", "report.json", "refusal.json"
_WHERE = "a request of gemma3c to itself"
_NO_RANDOMIZE, _ASK = 0x0040000, 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A plan to be built.

    Args:
        onnx: the graph, a file of the folder; the weights that it points to lie beside it.
        plan: the file to write into the folder.
        architectures: 80 for sm_80. Full TensorRT builds for the GPU that is there, which must be the one that is named.
        profiles: the sizes; their order gives them their numbers.
        kernels: whether plugin nodes carry the hash of a ``kernels.json``, which lies in the folder too.
    """

    onnx: str
    plan: str
    flavour: Flavour
    architectures: tuple[int, ...]
    profiles: tuple[Mapping[str, Range], ...]
    kernels: bool = True


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why there is no plan, where that is known."""

    message: str
    hint: str | None
    nodes: tuple[NodeError, ...] = ()


def main(folder: Path) -> int:
    """Does what ``request.json`` asks for."""
    begin = time.perf_counter()
    fixed = fix_addresses()
    request = records.from_json(PlanRequest, json.loads((folder / REQUEST).read_text()), where=_WHERE)
    try:
        report = build(request)
    except Gemma3CompileError as error:
        cause = take_failure() or error
        nodes = error.errors if isinstance(error, ParseError) else ()
        _write(folder / REFUSAL, Refusal(message=cause.message, hint=cause.hint, nodes=nodes))
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = time.perf_counter() - begin
    built = BuiltPlan(report=report, seconds=seconds, peak_rss_bytes=peak, fixed_addresses=fixed)
    _write(folder / REPORT, built)
    return 0


def fix_addresses() -> bool:
    """Starts this process once more, at addresses that are not drawn at random; False where the system refuses.

    Source: personality(2), ADDR_NO_RANDOMIZE. Some containers forbid it.
    """
    personality = getattr(ctypes.CDLL(None), "personality", None)
    if personality is None:
        return False
    present = personality(_ASK)
    if present & _NO_RANDOMIZE:
        return True
    if present >= 0 and personality(present | _NO_RANDOMIZE) >= 0:
        os.execv(sys.executable, sys.orig_argv)
    return False


def build(request: PlanRequest) -> PlanReport:
    """Parses, describes, builds and writes, in the folder that is the current one."""
    trt = load(request.flavour)
    register_plugins(trt, KernelStore.open(Path()) if request.kernels else None)
    parsed = parse(trt, Path(request.onnx), logger=trt.Logger(trt.Logger.INFO))
    network = describe(parsed)
    config = _config(parsed, request)
    written = _serialize(parsed, config, Path(request.plan))
    return PlanReport(
        flavour=request.flavour,
        tensorrt_version=trt.__version__,
        architectures=tuple(f"sm_{number}" for number in request.architectures),
        network=network,
        profiles=request.profiles,
        plan_bytes=written,
    )


def _config(parsed: ParsedNetwork, request: PlanRequest) -> Any:
    trt, config = parsed.trt, parsed.builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if request.flavour == "rtx":
        # Never CURRENT, which ends the process where there is no GPU.
        config.num_compute_capabilities = len(request.architectures)
        for index, number in enumerate(request.architectures):
            config.set_compute_capability(_capability(trt, number), index)
    add_profiles(parsed, config, request.profiles)
    return config


def _capability(trt: ModuleType, number: int) -> Any:
    capability = getattr(trt.ComputeCapability, f"SM{number}", None)
    if capability is None:
        raise ExportError(f"TensorRT for RTX {trt.__version__} has no plans for sm_{number}")
    return capability


def _serialize(parsed: ParsedNetwork, config: Any, plan: Path) -> int:
    """Writes the plan as it comes, which with constant weights is as large as they are; returns its bytes."""
    with plan.open("wb") as file:
        writer = _writer(parsed.trt, file)
        if not parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer):
            raise ExportError(f"TensorRT builds no plan from {plan.with_suffix('.onnx').name}")
        return file.tell()


def _writer(trt: ModuleType, file: IO[bytes]) -> Any:
    """TensorRT's stream writer over a file; a class that can be made only where the module is at hand."""

    class FileWriter(trt.IStreamWriter):  # type: ignore[name-defined, misc]  # a module's attribute is no type to mypy
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return FileWriter()


def _write(path: Path, facts: object) -> None:
    path.write_text(json.dumps(records.to_json(facts)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
