"""Bundles for TensorRT without what takes long to make: no kernels are compiled, and a plan is a file of a few bytes.

Graphs, weights, manifest and what is told of each plan's network are what a build writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from gemma3_compile.pipeline import BuildRequest, build
from gemma3_compile.targets import trt as target
from graphs.trt import kernels
from graphs.trt.build import PlanRequest
from graphs.trt.kernels import KernelsFacts
from graphs.trt.network import describe, parse
from graphs.trt.report import BuiltPlan, PlanReport
from runtimes.bundle import hash_file
from runtimes.manifest import MANIFEST_NAME
from runtimes.trt import load, register_plugins

SEED = 7
NO_KERNELS = b"{}\n"


def _without_kernels(folder: Path, *arguments: object, **options: object) -> KernelsFacts:
    (folder / "kernels.json").write_bytes(NO_KERNELS)
    return KernelsFacts(
        hash=hashlib.sha256(NO_KERNELS).hexdigest(),
        file="kernels.json",
        tuning_records=(),
        cubins=0,
        cubin_bytes=0,
        warnings=(),
    )


def _without_a_builder(folder: Path, request: PlanRequest) -> BuiltPlan:
    """Reads the graph as the builder does, and says of it what the builder says."""
    trt = load("rtx")
    register_plugins(trt, None)
    network = describe(parse(trt, folder / request.onnx, logger=trt.Logger(trt.Logger.ERROR)))
    (folder / request.plan).write_bytes(b"no plan")
    report = PlanReport(
        flavour=request.flavour,
        tensorrt_version=trt.__version__,
        architectures=tuple(f"sm_{number}" for number in request.architectures),
        network=network,
        profiles=request.profiles,
        plan_bytes=7,
    )
    return BuiltPlan(report=report, seconds=0.0, peak_rss_bytes=0, fixed_addresses=True)


def build_trt(out: Path, **request: Any) -> Path:
    """A bundle of nano unless ``request`` says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "write_kernels", _without_kernels)
        patch.setattr(target, "build_plan", _without_a_builder)
        given: dict[str, Any] = {"architectures": (89,), "flavour": "rtx", "batch": 3}
        if "checkpoint" not in request:
            given |= {"size": "nano", "random_seed": SEED, "context": 96, "chunk": 64}
        return build(BuildRequest(target="trt", out=out, **{**given, **request}))


def damage(folder: Path, change: Callable[[onnx.ModelProto], None], name: str = "decoder.onnx") -> None:
    """Changes a graph of a bundle, and makes the manifest tell of the file as it is now."""
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    onnx.save(model, folder / name)
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"sha256": hash_file(folder / name), "bytes": (folder / name).stat().st_size}
    path.write_text(json.dumps(manifest))
