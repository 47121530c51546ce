"""``build``: what reaches the pipeline, and what is refused before it is imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemma3_compile.cli.build_command import default_out
from runtimes.bundle_writer import BundleWriter
from tests.gemma3_compile.cli.conftest import Gemma3c
from tests.runtimes.manifests import write

pytestmark = pytest.mark.usefixtures("pipeline")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A pipeline that notes what it was asked, in the place of the real one, which needs torch."""
    from dataclasses import dataclass

    asked: list[Any] = []

    @dataclass(frozen=True)
    class Decision:
        name: str = "weights"
        choice: str = "input"
        reason: str = "a reason"

    @dataclass(frozen=True)
    class Plan:
        target: str = "ort"
        size: str = "4b"
        source: str = "random weights"
        weights_bytes: int = 8_600_000_000
        context: int = 4096
        cache_bytes: int = 500_000_000
        peak_bytes: int = 1_100_000_000
        decisions: tuple[Decision, ...] = (Decision(),)
        notes: tuple[str, ...] = ("a hint",)

    def build(request: Any, progress: Any) -> Path:
        asked.append(request)
        progress.note("a decision")
        return Path(request.out)

    module = ModuleType("gemma3_compile.pipeline")
    vars(module).update(
        BuildRequest=lambda **fields: type("Request", (), fields), build=build, plan=lambda request: Plan()
    )
    monkeypatch.setitem(sys.modules, "gemma3_compile.pipeline", module)
    yield asked


def test_every_option_reaches_the_pipeline(gemma3c: Gemma3c, pipeline: list[Any], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    result = gemma3c(
        *("build", "--target", "ORT", "--size", "4B", "--checkpoint", "org/model", "--dtype", "int4"),
        *("--out", tmp_path / "out", "--overwrite", "--context", 100, "--calibration", tmp_path / "text"),
        *("--revision", "main", "--token", "secret", "--offline"),
        *("--activations", "int16", "--rounding", "nearest"),
        *("--flavour", "rtx", "--arch", "sm_80", "--arch", "SM_120", "--weights", "input", "--chunk", 64, "--batch", 2),
    )
    assert (result.code, result.out, result.err) == (0, f"{tmp_path / 'out'}\n", "a decision\n")
    (request,) = pipeline
    fields = {name: value for name, value in vars(request).items() if not name.startswith("_")}
    assert fields == {
        "target": "ort",
        "size": "4b",
        "checkpoint": "org/model",
        "random_seed": None,
        "dtype": "int4",
        "activations": "int16",
        "flavour": "rtx",
        "architectures": (80, 120),
        "weights": "input",
        "chunk": 64,
        "batch": 2,
        "rounding": "nearest",
        "out": tmp_path / "out",
        "overwrite": True,
        "context": 100,
        "calibration": tmp_path / "text",
        "token": "secret",
        "offline": True,
        "revision": "main",
    }


def test_the_token_may_come_from_the_environment(
    gemma3c: Gemma3c, pipeline: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-env")
    gemma3c("build", "--size", "1b", "--out", tmp_path / "out")
    assert pipeline[0].token == "from-env"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing says what to build"),
        (["--checkpoint", "x", "--random-weights", "0"], "exclude each other"),
        (["--size", "1b", "--json"], "--json is for --dry-run only"),
        (["--size", "1b", "--target", "cuda"], "builds for ort and trt; the target cuda is planned"),
        (["--size", "1b", "--target", "trt-rtx"], "--target trt --flavour rtx"),
        (["--size", "1b", "--dtype", "float16"], "float16 overflows"),
        (["--size", "1b", "--dtype", "bfloat16"], "no bfloat16 on a CPU"),
        (["--size", "1b", "--dtype", "fp8"], "--dtype fp8 is for --target trt"),
        (["--size", "1b", "--target", "trt", "--dtype", "float32"], "--dtype float32 is for --target ort"),
    ],
)
def test_what_cannot_be_met_is_refused(
    gemma3c: Gemma3c, pipeline: list[Any], arguments: list[str], message: str
) -> None:
    result = gemma3c("build", *arguments)
    assert (result.code, result.out, pipeline) == (2, "", [])
    assert message in result.err
    assert "hint: " in result.err


def test_an_existing_destination_is_refused_before_any_work(
    gemma3c: Gemma3c, pipeline: list[Any], tmp_path: Path
) -> None:
    write(tmp_path / "nano")
    result = gemma3c("build", "--size", "nano", "--out", tmp_path / "nano")
    assert (result.code, pipeline) == (2, [])
    assert "exists already" in result.err
    assert gemma3c("build", "--size", "nano", "--out", tmp_path / "nano", "--overwrite").code == 0
    assert gemma3c("build", "--size", "nano", "--out", tmp_path / "nano", "--dry-run").code == 0


def test_dry_run_prints_the_plan_and_builds_nothing(gemma3c: Gemma3c, pipeline: list[Any]) -> None:
    result = gemma3c("build", "--size", "4b", "--dry-run")
    assert (result.code, pipeline) == (0, [])
    for fact in (
        "weights                     input: a reason",
        "8.60 GB",
        "caches at 4096 tokens",
        "500 MB",
        "1.10 GB",
        "note: a hint",
    ):
        assert fact in result.out
    assert json.loads(gemma3c("build", "--size", "4b", "--dry-run", "--json").out)["weights_bytes"] == 8_600_000_000


@pytest.mark.parametrize(
    ("size", "checkpoint", "name"),
    [
        ("4b", "org/model", "4b-ort-int8"),
        (None, "org/model", "model-ort-int8"),
        (None, "/a/b/some.q4.gguf", "some.q4-ort-int8"),
        (None, "folder/", "folder-ort-int8"),
    ],
)
def test_default_out(size: str | None, checkpoint: str | None, name: str) -> None:
    assert default_out("ort", size, checkpoint, "int8") == Path("bundles") / name


def test_a_second_build_to_the_same_place_says_so(
    gemma3c: Gemma3c, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build(request: Any, progress: Any) -> Path:
        with BundleWriter(request.out):
            raise AssertionError("two writers at once")

    monkeypatch.setattr(sys.modules["gemma3_compile.pipeline"], "build", build)
    with BundleWriter(tmp_path / "nano"):
        result = gemma3c("build", "--size", "nano", "--out", tmp_path / "nano")
    assert result.code == 1
    assert "another process is writing the bundle" in result.err
