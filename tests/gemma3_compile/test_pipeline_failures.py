"""Builds that fail and leave nothing behind, what a build notes, and the plan that is made beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from gemma3_compile import pipeline
from gemma3_compile.formats import Dtype
from gemma3_compile.pipeline import build, plan
from gemma3_compile.weights_writer import WeightsWriter
from runtimes.bundle import Bundle
from runtimes.errors import BundleError, ExportError, Gemma3CompileError, UsageError
from runtimes.progress import Progress
from runtimes.session import open_session
from tests.gemma3_compile.builds import nano_gguf, request

pytestmark = pytest.mark.usefixtures("fast_export")


def test_the_source_date_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    bundle = Bundle.open(build(request(tmp_path / "dated", empty_weights=True)))
    assert bundle.manifest.created == "2023-11-14T22:13:20Z"


class Notes(Progress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_model_without_a_tokenizer_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma3_compile.checkpoints.random_weights.RandomCheckpoint.tokenizer", lambda self: None)
    notes = Notes()
    bundle = Bundle.open(build(request(tmp_path / "mute", empty_weights=True), notes))
    assert bundle.manifest.tokenizer is None and "tokenizer.model" not in bundle.manifest.files
    assert notes.notes == ["the checkpoint has no SentencePiece model, so the bundle takes token ids only"]


def fail_writing(error: BaseException) -> object:
    """Half of the weights are written, then ``error`` comes."""
    write = WeightsWriter._write_source
    calls = []

    def half(self: WeightsWriter, *arguments: object) -> int:
        calls.append(arguments)
        if len(calls) > 20:
            raise error
        return write(self, *arguments)

    return half


FAILURES: dict[str, tuple[BaseException, type[BaseException]]] = {
    "an interrupt": (KeyboardInterrupt(), KeyboardInterrupt),
    "no space left": (OSError(28, "No space left on device"), BundleError),
    "an error of ours": (ExportError("the format needs `minimums`"), ExportError),
    "an error of nobody's": (ZeroDivisionError("division by zero"), ZeroDivisionError),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    raised, seen = FAILURES[name]
    monkeypatch.setattr(WeightsWriter, "_write_source", fail_writing(raised))
    with pytest.raises(seen):
        build(request(tmp_path / "deep" / "bundle"))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_bundle_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build(request(tmp_path / "bundle"))
    before = (out / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(WeightsWriter, "_write_source", fail_writing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build(request(out, overwrite=True, dtype="int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (out / "manifest.json").read_bytes() == before
    Bundle.open(out).verify()
    build(request(out, overwrite=True, dtype="int8"))
    assert Bundle.open(out).manifest.weights.dtype == "int8"


def test_no_space_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(BundleError, match="no disk space"):
        build(request(tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "cuda"}, "this version builds the targets `ort` and `trt`; `cuda` is not there yet"),
        ({"weights": "input", "architectures": (80,)}, "--arch, --weights are for --target trt only"),
        ({"target": "trt", "activations": "int8", "dtype": "auto"}, "--activations is for --target ort only"),
        ({"target": "trt", "dtype": "float32"}, "unknown dtype `float32`"),
        ({"target": "trt", "dtype": "auto", "context": 513}, "the context 513 is longer than the 512 of nano"),
        (
            {"target": "trt", "dtype": "auto", "chunk": 65, "context": 64},
            "a chunk of 65 tokens does not go into a context of 64",
        ),
        (
            {"target": "trt", "dtype": "auto", "chunk": 3},
            "a chunk of 3 tokens does not hold a picture, which is 4 tokens",
        ),
        ({"dtype": "fp16"}, "unknown dtype `fp16`"),
        ({"size": "3b"}, "3b"),
        ({"size": None}, "random weights need a size"),
        ({"checkpoint": "nano.gguf"}, "exclude each other"),
    ],
)
def test_a_request_that_cannot_be_met(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(request(tmp_path / "bundle", **changes))
    assert message in caught.value.message and caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_is_taken(bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        build(request(bundles["int8"].root))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not a bundle"):
        build(request(tmp_path / "mine", overwrite=True))
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_checkpoint_of_another_size_writes_nothing(builds_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Gemma3CompileError, match="another size"):
        build(request(tmp_path / "bundle", checkpoint=nano_gguf(builds_folder), size="270m", random_seed=None))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_the_plan_tells_the_bytes_that_are_written(bundles: Mapping[str, Bundle], tmp_path: Path, dtype: Dtype) -> None:
    asked = plan(request(tmp_path / "bundle", dtype=dtype))
    assert asked.weights_bytes == bundles[dtype].manifest.files["weights.safetensors"].bytes
    assert asked.context == 512 and asked.size == "nano" and asked.source == "random weights, size nano, seed 7"
    assert asked.peak_bytes > pipeline.WRITING_BYTES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("context", [8, 64, 512])
def test_the_plan_tells_the_bytes_of_the_caches(bundles: Mapping[str, Bundle], tmp_path: Path, context: int) -> None:
    """As a session allocates them."""
    asked = plan(request(tmp_path / "bundle", context=context))
    with open_session(bundles["float32"], provider="cpu", threads=1) as session:
        assert session.open_caches(1, context).bytes_allocated == asked.cache_bytes


def test_a_context_that_the_model_has_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the context 513 is longer than the 512 of nano"):
        plan(request(tmp_path / "bundle", context=513))
