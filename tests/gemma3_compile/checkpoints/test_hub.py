"""Hugging Face ids: what is fetched, in which order, and what is said where it cannot be had."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from gemma3_compile.checkpoints import open_checkpoint
from gemma3_compile.presets import preset
from runtimes.errors import CheckpointError, UsageError

_TOKEN = "hf_SecretSecretSecretSecret"


class Hub:
    """Stands for huggingface_hub: serves one folder as a snapshot, or raises."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.config_error: Exception | None = None
        self.snapshot_error: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def download(self, repository: str, name: str, **options: Any) -> str:
        self.calls.append((f"{repository}/{name}", options))
        if self.config_error:
            raise self.config_error
        return str(self.folder / name)

    def snapshot(self, repository: str, **options: Any) -> str:
        self.calls.append((repository, options))
        if self.snapshot_error:
            raise self.snapshot_error
        return str(self.folder)


@pytest.fixture
def hub(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(folders["sharded"], monkeypatch)


def _raised(kind: type[Exception], text: str = "text of the library", cause: Exception | None = None) -> Exception:
    """An error of huggingface_hub without the HTTP response that its constructor wants."""
    error = kind.__new__(kind, text)
    Exception.__init__(error, text)
    error.__cause__ = cause
    return error


def test_snapshot_is_opened(hub: Hub) -> None:
    checkpoint = open_checkpoint("somebody/nano-gemma", size="nano", token=_TOKEN, offline=True, revision="v1.0")
    assert checkpoint.config == preset("nano")
    assert checkpoint.source == "somebody/nano-gemma@sharded"
    assert [name for name, _ in hub.calls] == ["somebody/nano-gemma/config.json", "somebody/nano-gemma"]
    for _, options in hub.calls:
        assert (options["token"], options["local_files_only"], options["revision"]) == (_TOKEN, True, "v1.0")


def test_only_files_that_are_needed_are_fetched(hub: Hub) -> None:
    open_checkpoint("somebody/nano-gemma", size=None)
    patterns = hub.calls[-1][1]["allow_patterns"]
    wanted = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model"]
    wanted += ["model.safetensors", "model-00001-of-00005.safetensors", "model.safetensors.index.json"]
    for name in wanted:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
    for name in ("pytorch_model.bin", "tokenizer.json", "original/consolidated.00.pth", "README.md", "model.gguf"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize(("size", "repository"), [("270m", "google/gemma-3-270m-it"), ("12b", "google/gemma-3-12b-it")])
def test_a_size_alone_means_the_published_checkpoint(hub: Hub, size: str, repository: str) -> None:
    with pytest.raises(CheckpointError, match="of another size"):
        open_checkpoint(None, size=size)
    assert [name for name, _ in hub.calls] == [f"{repository}/config.json"], "the size is checked before the weights"


def test_nano_is_not_published(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="nano has no published weights") as caught:
        open_checkpoint(None, size="nano")
    assert "--random-weights" in (caught.value.hint or "")
    assert not hub.calls


_OFFLINE = errors.OfflineModeIsEnabled("offline mode is enabled")
_REASONS: dict[str, tuple[Callable[[], Exception], str]] = {
    "gated": (lambda: _raised(errors.GatedRepoError), "access is gated"),
    "unknown": (lambda: _raised(errors.RepositoryNotFoundError), "there is no such repository, or it is private"),
    "no revision": (lambda: _raised(errors.RevisionNotFoundError), "there is no such revision"),
    "offline by option": (
        lambda: _raised(errors.LocalEntryNotFoundError),
        r"not in the local cache and the hub may not be asked \(offline\)",
    ),
    "offline by variable": (
        lambda: _raised(errors.LocalEntryNotFoundError, cause=_OFFLINE),
        r"not in the local cache and the hub may not be asked \(offline\)",
    ),
    "no network": (
        lambda: _raised(errors.LocalEntryNotFoundError, cause=ConnectionError("refused")),
        "not in the local cache and the hub cannot be reached",
    ),
    "offline": (lambda: _OFFLINE, r"the hub may not be asked \(offline\)"),
    "no config.json": (lambda: _raised(errors.EntryNotFoundError), "it lacks a file that a checkpoint needs"),
    "anything else": (lambda: ValueError(f"odd\nBearer {_TOKEN}"), "ValueError: odd$"),
    "a token in the text": (lambda: OSError(f"Bearer {_TOKEN} refused"), r"OSError: Bearer \*\*\* refused"),
}


@pytest.mark.parametrize("step", ["config_error", "snapshot_error"])
@pytest.mark.parametrize("case", _REASONS)
def test_where_it_cannot_be_had_the_three_ways_on_are_told(case: str, step: str, hub: Hub) -> None:
    make, message = _REASONS[case]
    setattr(hub, step, make())
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint("somebody/nano-gemma", size=None, token=_TOKEN)
    assert "somebody/nano-gemma cannot be had" in caught.value.message
    hint = caught.value.hint or ""
    for way in (
        "hf auth login",
        "https://huggingface.co/somebody/nano-gemma",
        "--checkpoint PATH",
        "--random-weights SEED",
    ):
        assert way in hint
    assert _TOKEN not in caught.value.message + hint


def test_interrupt_goes_through(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint("somebody/nano-gemma", size=None)


_CALL = """
from gemma3_compile.checkpoints import open_checkpoint
from runtimes.errors import CheckpointError
try:
    open_checkpoint(None, size="12b", offline={offline})
except CheckpointError as error:
    print(error.message, "|", error.hint)
"""


@pytest.mark.parametrize(("variable", "option"), [("1", False), ("0", True)])
def test_the_real_library_offline(variable: str, option: bool, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": variable, "HF_HOME": str(tmp_path), "HF_TOKEN": _TOKEN}
    ran = subprocess.run(
        [sys.executable, "-c", _CALL.format(offline=option)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert "google/gemma-3-12b-it cannot be had: it is not in the local cache" in ran.stdout
    assert "(offline)" in ran.stdout
    assert "--random-weights SEED" in ran.stdout
    assert _TOKEN not in ran.stdout + ran.stderr


# --- what is a path and what is an id ---------------------------------------------------------------------------


def test_an_existing_path_is_never_an_id(hub: Hub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders["v5"].parent.parent)
    relative = f"{folders['v5'].parent.name}/v5"
    assert open_checkpoint(relative, size=None).source == "v5"
    assert not hub.calls


@pytest.mark.parametrize(
    "source", ["missing/model.gguf", "/no/such/folder", "nowhere", "./a/b", "a/b/c", "x/y.safetensors"]
)
def test_a_path_that_does_not_exist_is_not_looked_up(hub: Hub, source: str) -> None:
    with pytest.raises(CheckpointError, match=f"there is no checkpoint at {source}") as caught:
        open_checkpoint(source, size=None)
    assert caught.value.hint
    assert not hub.calls


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights.onnx: a .safetensors or .gguf file or a folder was expected"):
        open_checkpoint(tmp_path / "weights.onnx", size=None)


def test_wrong_size_names_both(folders: dict[str, Path], gguf_270m_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folders["v5"], size="1b")
    assert "expected 1b: 26 layers, hidden 1152" in caught.value.message
    assert "holds nano: 6 layers, hidden 64, with vision" in caught.value.message
    with pytest.raises(CheckpointError, match=r"expected 12b: .* holds 270m: 18 layers, hidden 640, text-only"):
        open_checkpoint(gguf_270m_path, size="12b")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"source": None, "size": None}, "neither a checkpoint nor a size"),
        ({"source": None, "size": None, "random_seed": 1}, "random weights need a size"),
        ({"source": "a/b", "size": "nano", "random_seed": 1}, "exclude each other"),
        ({"source": None, "size": "13b"}, "unknown size"),
    ],
)
def test_contradicting_requests_are_usage_errors(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_checkpoint(**request_)
    assert caught.value.exit_code == 2
    assert caught.value.hint
