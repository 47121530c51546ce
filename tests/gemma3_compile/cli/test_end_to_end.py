"""The installed program, as a process: build the nano model, use the bundle, and interrupt a build."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

GEMMA3C = [sys.executable, "-m", "gemma3_compile"]
BUILD = [*GEMMA3C, "build", "--size", "nano", "--random-weights", "7", "--dtype", "float32", "--out"]


def gemma3c(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*GEMMA3C, *map(str, arguments)], input=stdin, capture_output=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "nano"
    done = subprocess.run([*BUILD, out], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    return out


def test_the_bundle_verifies_and_can_be_inspected(bundle: Path) -> None:
    assert gemma3c("verify", bundle).returncode == 0
    manifest = json.loads(gemma3c("inspect", bundle, "--json").stdout)
    assert manifest["model"]["name"] == "nano"
    assert {path.name for path in bundle.parent.iterdir()} == {"nano"}


def test_two_greedy_runs_write_the_same(bundle: Path) -> None:
    runs = [gemma3c("run", bundle, "-", "--temperature", 0, "--max-tokens", 8, "--json", stdin=b"hello") for _ in "ab"]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    first, second = (json.loads(run.stdout) for run in runs)
    assert first["token_ids"] == second["token_ids"]
    assert 1 <= len(first["token_ids"]) <= 8


def test_a_picture_that_is_none_and_a_prompt_too_long(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not a picture")
    done = gemma3c("run", bundle, "hello", "--image", tmp_path / "x.png")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert b"x.png" in done.stderr
    done = gemma3c("run", bundle, "word " * 600)
    assert done.returncode == 1
    assert b"512" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_chat_over_a_pipe(bundle: Path) -> None:
    done = gemma3c("chat", bundle, "--max-tokens", 4, "--temperature", 0, stdin=b"hello\nand then?\n/stats\n")
    assert done.returncode == 0, done.stderr
    assert b"of them from the cache" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    # A shell's background job ignores SIGINT, and its children inherit that: the build begins with the default.
    command, begin = [*BUILD, tmp_path / "new/nano"], partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, preexec_fn=begin, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("new/.nano.partial-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
