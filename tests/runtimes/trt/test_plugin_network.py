"""Both plugins in a real plan of TensorRT for RTX, which builds without a GPU. Each build is a process of its own.

That equal builds are equal bytes is a matter of the worker that builds them: see tests/graphs/trt/test_build.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from graphs.trt.kernels import write_kernels
from runtimes.gpu.kernel_store import KernelStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nano")
    write_kernels(made, model_shapes(preset("nano")), [80], max_batch=2, chunk=64, max_images=2)
    return made


def built(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the process found, and what it and TensorRT wrote to stderr."""
    command = [sys.executable, "-m", "tests.runtimes.trt.plan", str(folder), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    where = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=where)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index('{"parsed"') :])
    return found, done.stderr


def test_a_plan_of_both(folder: Path) -> None:
    found, _ = built(folder)
    digest = KernelStore.open(folder).hash
    assert found["parsed"] and not found["errors"] and found["failure"] is None
    window, pool = found["layers"]
    assert (window["kind"], pool["kind"]) == ("LayerType.PLUGIN_V3", "LayerType.PLUGIN_V3")
    assert (window["plugin"], pool["plugin"]) == ("SlidingWindowAttentionPlugin", "SigLIPPoolPlugin")
    assert window["fields"] == {"window": 16, "scale": 0.25, "kernels": digest}
    assert pool["fields"] == {"pool": 2, "eps": pytest.approx(1e-6), "kernels": digest}
    assert (window["aliases"], pool["aliases"]) == ([-1, 3, 4], [-1])
    assert found["outputs"] == {
        "out": ["DataType.BF16", [-1, -1, 4, 32]],
        "k_cache_out": ["DataType.BF16", [-1, 2, 16, 32]],
        "v_cache_out": ["DataType.BF16", [-1, 2, 16, 32]],
        "y": ["DataType.BF16", [-1, 4, 48]],
    }
    plan = (folder / "plan").read_bytes()
    assert digest.encode() in plan and b"\x7fELF" not in plan  # the kernels' hash, not the kernels


def test_a_graph_without_kernels_parses_and_builds(folder: Path) -> None:
    found, _ = built(folder, "--kernels", "", "--without-store")
    assert found["plan"] and found["failure"] is None
    assert found["layers"][0]["fields"]["kernels"] == ""


@pytest.mark.parametrize(
    ("arguments", "parsed", "words"),
    [
        (["--kernels", "0" * 64], False, "SlidingWindowAttention was built with the kernels 000000000000"),
        (["--without-store"], True, "SlidingWindowAttention has no kernels"),
        (["--batch", "4"], True, "is made for `1 <= B <= 2`, but got 4"),
    ],
)
def test_what_goes_wrong_is_kept_where_tensorrt_goes_on(
    folder: Path, arguments: list[str], parsed: bool, words: str
) -> None:
    """TensorRT prints what a plugin raises, and may build a plan nevertheless."""
    found, _ = built(folder, *arguments)
    assert found["parsed"] is parsed
    assert words in found["failure"]
