"""``gemma3c profile``: a floor without a GPU, what goes where, and what wrong requests get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma3_compile.cli import profile_command
from tests.autotune.profiles import made
from tests.gemma3_compile.cli.conftest import Gemma3c


@pytest.fixture(autouse=True)
def _own_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No records of the user's reach these tests."""
    monkeypatch.setenv("GEMMA3C_RECORDS", str(tmp_path / "records"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A made-up measurement in the place of a GPU's; holds how it was asked for."""
    asked: dict[str, Any] = {}

    def make_profile(size: str, stage: str | None, **options: Any) -> Any:
        asked.update(size=size, stage=stage, **options)
        return made(tmp_path, "prefill", "decode")

    monkeypatch.setattr(profile_command, "make_profile", make_profile)
    return asked


@pytest.mark.parametrize("size", ["nano", "270m", "4b", "27b"])
def test_the_floor_of_a_named_gpu(gemma3c: Gemma3c, size: str) -> None:
    result = gemma3c("profile", "--size", size, "--gpu", "h100", "--context", "256")
    assert (result.code, result.err) == (0, "")
    head, rates, *rest = result.out.splitlines()
    assert head == f"Gemma 3 {size}, bfloat16, on NVIDIA H100 80GB HBM3"
    assert rates == "3.35 TB/s read, 989 TFLOP/s in bf16 (datasheet)"
    titles = [line for line in rest if line.startswith(("prefill:", "decode:", "vision:"))]
    assert titles[:2] == ["prefill: 256 tokens, batch 1", "decode: one token after 256, batch 1"]
    assert len(titles) == (2 if size == "270m" else 3)
    assert sum(line.startswith("floor ") for line in rest) == len(titles)


def test_a_decode_floor_is_at_least_the_weights_and_the_head_over_the_read_rate(gemma3c: Gemma3c) -> None:
    """4B in bf16: 3.88 billion weights, embedding and head shared, 7.76 GB (docs: findings of one H100)."""
    result = gemma3c(
        "profile", "--size", "4b", "--stage", "decode", "--context", "1024", "--gpu", "h100", "--json", "-"
    )
    (stage,) = json.loads(result.out)["stages"]
    total = sum(row["bytes"] * row["count"] for row in stage["rows"])
    assert 7.76e9 <= total <= 1.1 * 7.76e9
    assert stage["floor_us"] == pytest.approx(sum(row["floor_us"] * row["count"] for row in stage["rows"]))


def test_smaller_weights_have_a_lower_floor(gemma3c: Gemma3c) -> None:
    def floor(dtype: str) -> float:
        arguments = ("--size", "4b", "--stage", "decode", "--context", "1024", "--gpu", "h100", "--json", "-")
        value: float = json.loads(gemma3c("profile", "--dtype", dtype, *arguments).out)["stages"][0]["floor_us"]
        return value

    assert floor("int4") < 0.62 * floor("int8") < 0.62 * 0.62 * floor("bfloat16")


def test_without_a_gpu_it_says_how_to_go_on(gemma3c: Gemma3c, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = gemma3c("profile", "--size", "nano")
    assert (result.code, result.out) == (1, "")
    error, hint = result.err.splitlines()
    assert error == "error: no CUDA GPU is visible to torch"
    assert hint.startswith("hint: --gpu prints the floor of a GPU that is not here: a100, ") and "h100" in hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "no GPU is known as `h1000`"),
        (["--size", "270m", "--stage", "vision", "--gpu", "h100"], "270m is for text only"),
        (["--size", "270m", "--context", "40000", "--gpu", "h100"], "--context 40000 is more than the 32768 tokens"),
        (["--size", "12bb"], "did you mean '12b'?"),
        (["--stage", "decoder"], "did you mean 'decode'?"),
        (["--dtype", "float16"], "the kernels run in bfloat16, not in float16"),
        (["--batch", "0"], "--batch"),
        (["--html", "/no/such/folder/page.html", "--gpu", "h100"], "there is no folder /no/such/folder"),
    ],
)
def test_wrong_requests(gemma3c: Gemma3c, arguments: list[str], message: str) -> None:
    result = gemma3c("profile", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err.splitlines()[0]


def test_a_measurement_prints_a_table_with_the_largest_loss_first(gemma3c: Gemma3c, measured: dict[str, Any]) -> None:
    result = gemma3c("profile", "--size", "4b", "--stage", "decode", "--batch", "2")
    assert result.code == 0
    assert (measured["size"], measured["stage"], measured["batch"], measured["context"]) == ("4b", "decode", 2, 8192)
    lines = result.out.splitlines()
    table = lines[lines.index("decode: one token after 1000, batch 1") + 1 :]
    assert table[0].split() == ["where", "kernel", "calls", "µs", "floor", "µs", "of", "floor", "GB/s", "TFLOP/s", "share", "lost", "µs"]  # fmt: skip
    assert table[1].startswith("gate & up <projection>  matvec ") and table[1].endswith("3776.0")
    assert table[6] == "global attention (attention) failed: out of memory"
    assert "without the 1 that failed" in table[7] and table[7].endswith("50% of the floor reached")
    assert result.err.startswith("warning: some shapes have no tuning record for NVIDIA H100 80GB HBM3")


def test_the_default_context_is_what_the_model_takes(gemma3c: Gemma3c, measured: dict[str, Any]) -> None:
    gemma3c("profile", "--size", "nano")
    assert measured["context"] == 512


def test_files_are_written_whole_and_named(gemma3c: Gemma3c, measured: dict[str, Any], tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("p.json", "p.html", "p.trace")]
    result = gemma3c("profile", "--json", paths[0], "--html", paths[1], "--trace", paths[2])
    assert [line for line in result.err.splitlines() if line.startswith("wrote")] == [f"wrote {path}" for path in paths]
    assert json.loads(paths[0].read_text())["format"] == "gemma3c profile"
    assert paths[1].read_text().startswith("<!doctype html>")
    assert json.loads(paths[2].read_text())["traceEvents"]
    assert "where" in result.out
    assert not list(tmp_path.glob(".p*"))


def test_json_on_stdout_is_alone_there(gemma3c: Gemma3c, measured: dict[str, Any]) -> None:
    result = gemma3c("profile", "--json", "-")
    assert json.loads(result.out)["model"] == "12b"
