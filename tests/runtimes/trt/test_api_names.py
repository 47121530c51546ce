"""Every name of TensorRT's and of CUDA's that ``runtimes/trt`` uses exists in the installed bindings, and none is an old one.

The bindings have no types, so mypy finds no misspelt method, and what no GPU runs, no test would meet. Here objects are
known by the names that the code gives them: an ``engine`` is an ``ICudaEngine``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from runtimes.trt import load

FOLDER = Path(__file__).parents[3] / "runtimes" / "trt"
FILES = sorted(FOLDER.glob("*.py"))
REMOVED = {
    "execute_async", "execute_async_v2", "num_bindings", "get_binding_shape", "get_binding_name", "get_binding_index",
    "set_binding_shape", "binding_is_input", "max_workspace_size", "device_memory_size", "get_profile_shape", "max_batch_size",
    "create_execution_context_without_device_memory", "build_engine", "execute",
}  # fmt: skip
"""What older TensorRT had, or what is deprecated in 11."""


@cache
def _classes() -> dict[str, Any]:
    from cuda import core
    from cuda.bindings import driver
    from cuda.core import graph

    trt = load("rtx")
    return {
        "trt": trt, "engine": trt.ICudaEngine, "context": trt.IExecutionContext, "runtime": trt.Runtime,
        "config": trt.IRuntimeConfig, "runtime_cache": trt.IRuntimeCache, "flags": trt.EngineInvalidityDiagnostics,
        "specialisation": trt.DynamicShapesKernelSpecializationStrategy,
        "core": core, "driver": driver, "device": core.Device, "stream": core.Stream, "uploads": core.Stream,
        "builder": graph.GraphBuilder, "graph": graph.Graph,
    }  # fmt: skip


SESSION_FILES = (
    "caches",
    "contexts",
    "engine_file",
    "gpu",
    "log",
    "prefill",
    "runtime_cache",
    "session",
    "step",
    "vision",
    "weights",
)
OURS = {
    # The same words for objects of our own, where they are not TensorRT's.
    ("context", "set_input"), ("context", "set_address"), ("context", "check_complete"), ("context", "can_be_captured"), ("context", "run"),
    ("device", "architecture"), ("builder", "constant"), ("builder", "operation"),
}  # fmt: skip


def uses(path: Path) -> Iterator[tuple[str, str, int]]:
    """Owner, attribute and line of every attribute of a known owner; ``trt.A.B`` gives ``A`` of trt and ``B`` of A."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = _owner(node.value)
            if owner is not None:
                yield owner, node.attr, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_call":
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield "driver", str(name.value), node.lineno


def _owner(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _owner(node.value)
        if inner == "self" or inner is None:
            return node.attr.lstrip("_")
        return f"{inner}.{node.attr}" if inner == "trt" or inner.startswith("trt.") else node.attr.lstrip("_")
    return None


def _known(owner: str) -> Any | None:
    if owner.startswith("trt."):
        found: Any = _classes()["trt"]
        for part in owner.split(".")[1:]:
            found = getattr(found, part)
        return found
    return _classes().get(owner)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_exist(path: Path) -> None:
    missing = []
    for owner, name, line in uses(path):
        known = _known(owner)
        if known is None or (owner, name) in OURS or name.startswith("__"):
            continue
        if not hasattr(known, name):
            missing.append(f"{path.name}:{line}: {owner}.{name}")
    assert not missing, missing


def test_something_is_checked() -> None:
    found = {(owner, name) for stem in SESSION_FILES for owner, name, _ in uses(FOLDER / f"{stem}.py")}
    for use in (
        ("context", "execute_async_v3"), ("engine", "create_execution_context"), ("config", "cuda_graph_strategy"),
        ("runtime", "deserialize_cuda_engine"), ("driver", "cuMemcpyHtoDAsync"), ("builder", "begin_building"),
        ("trt.ExecutionContextAllocationStrategy", "USER_MANAGED"), ("runtime_cache", "deserialize"), ("stream", "wait"),
    ):  # fmt: skip
        assert use in found, use


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_old_is_called(path: Path) -> None:
    engines = ("engine", "context", "runtime", "config", "trt")
    assert not [(owner, name) for owner, name, _ in uses(path) if name in REMOVED and owner.split(".")[0] in engines]


def test_stand_ins_have_no_name_that_the_real_ones_lack() -> None:
    from tests.runtimes.trt import cuda_standin, tensorrt_standin

    pairs: list[tuple[type, str]] = [
        (cuda_standin.Driver, "driver"), (cuda_standin.Builder, "builder"), (cuda_standin.Graph, "graph"),
        (cuda_standin.Stream, "stream"), (tensorrt_standin.Engine, "engine"), (tensorrt_standin.Context, "context"),
        (tensorrt_standin.Config, "config"), (tensorrt_standin.RuntimeCache, "runtime_cache"),
        (tensorrt_standin.Runtime, "runtime"),
    ]  # fmt: skip
    own = {"put", "run_up_to"}
    for stand_in, name in pairs:
        public = {each for each in vars(stand_in) if not each.startswith("_")} - own
        assert not [each for each in public if not hasattr(_classes()[name], each)], stand_in
