"""A sound bundle passes, says so, and carries the receipt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gemma3_compile.cli import run
from gemma3_compile.pipeline import BuildRequest, build
from gemma3_compile.validate import Report, ValidateRequest, validate
from gemma3_compile.validate.report import RECEIPT
from runtimes.bundle import Bundle, hash_file
from runtimes.errors import CheckpointError, UsageError
from runtimes.manifest import MANIFEST_NAME
from tests.gemma3_compile.validate.faults import NANO_SEED


def validated(bundle: Path, **options: object) -> Report:
    return validate(ValidateRequest(bundle=bundle, write_receipt=False, **options))  # type: ignore[arg-type]


def test_every_stage_of_a_sound_bundle_is_within_tolerance(sound_bundle: Path) -> None:
    report = validated(sound_bundle)
    assert report.passed and report.findings == ()
    assert {row.stage for row in report.rows} == {"weights", "vision", "decoder", "decoder_image"}
    assert {row.against for row in report.rows} == {"checkpoint"}  # fp32: the same weights, compared once
    decode = next(row for row in report.rows if row.case == "decode, a batch of three")
    assert decode.divergence is not None and decode.divergence.top1 == 1.0
    assert 0 < decode.relative_error < 2e-5
    assert report.lines().__next__().split()[:4] == ["stage", "case", "against", "rows"]


def test_the_seed_that_the_bundle_names_is_read_again(sound_bundle: Path) -> None:
    report = validated(sound_bundle)
    assert report.references[1] == f"random weights, size nano, seed {NANO_SEED}"


def test_weights_of_another_seed_are_noticed(sound_bundle: Path) -> None:
    report = validated(sound_bundle, random_seed=NANO_SEED + 1)
    assert not report.passed
    assert {finding.cause for finding in report.findings} == {"weights"}
    assert all(row.passed for row in report.rows if row.against == "own weights")  # the graph is not to blame
    assert "another model" in "\n".join(report.findings[0].lines())


def test_rounded_weights_are_told_from_a_wrong_graph(int4_bundle: Path) -> None:
    report = validated(int4_bundle)
    assert report.passed, "\n".join(report.lines())
    kl = {row.against: row.divergence.kl_mean for row in report.rows if row.case == "text in chunks" and row.divergence}
    assert 1e-5 < kl["own weights"] < 0.02  # int8 activations
    assert kl["checkpoint"] > 10 * kl["own weights"]  # int4 weights
    alone = [row for row in report.rows if row.case == "each layer alone"]
    assert len(alone) == 1 and alone[0].relative_error < 1e-5
    weights = {row.case: row.relative_error for row in report.rows if row.stage == "weights"}
    assert weights["kept"] == 0.0 and 0.01 < weights["4 bits"] < 0.25


def test_the_receipt_goes_into_the_bundle(sound_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", str(sound_copy)]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip().endswith("are within tolerance") and err == ""
    bundle = Bundle.open(sound_copy)
    assert bundle.manifest.receipt == RECEIPT
    assert bundle.verify().unlisted == ()
    receipt = json.loads((sound_copy / RECEIPT).read_text())
    assert receipt["passed"] is True and receipt["receipt_version"] == 1
    assert receipt["bundle"]["sha256"]["decoder.onnx"] == bundle.manifest.files["decoder.onnx"].sha256
    assert run(["validate", str(sound_copy), "--reference", "bundle"]) == 0  # a second one takes its place
    again = json.loads((sound_copy / RECEIPT).read_text())
    assert len(again["references"]) == 1
    assert Bundle.open(sound_copy).verify().unlisted == ()
    assert sorted(path.name for path in sound_copy.parent.iterdir()) == ["copy"]  # nothing is left beside it


def test_json_and_no_receipt(sound_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["validate", str(sound_copy), "--json", "--no-receipt", "--tokens", "12", "--prompt", "a lens"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["passed"] is True
    assert found["inputs"]["longest"] > 12 and "the prompt" in {row["case"] for row in found["rows"]}
    assert "a lens" not in json.dumps(found)
    assert not (sound_copy / RECEIPT).exists() and Bundle.open(sound_copy).manifest.receipt is None


def test_a_bundle_beyond_tolerance_exits_with_1(sound_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A weight of NaN: the numbers part in the layer that reads it, and the receipt says so."""
    bundle = Bundle.open(sound_copy)
    weights = bundle.manifest.weights.file
    _overwrite(sound_copy / weights, "decoder.layers.2.input_layernorm.weight", np.nan)
    assert run(["validate", str(sound_copy)]) == 1  # a changed byte is told before anything is run
    assert f"was changed: {weights}" in capsys.readouterr().err
    _hash_anew(sound_copy, weights)
    assert run(["validate", str(sound_copy), "--reference", "bundle"]) == 1
    out = capsys.readouterr().out
    assert "layer 2 (local): overflow" in out and "sound in decoder: local layers 0-1" in out
    receipt = json.loads((sound_copy / RECEIPT).read_text())
    assert receipt["passed"] is False and "inf" in {row["relative_error"] for row in receipt["rows"]}


def test_pictures_of_the_user(sound_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "red.png"
    Image.new("RGB", (80, 60), (200, 30, 30)).save(picture)
    report = validated(sound_bundle, images=(picture,), prompt="What is it?", reference="bundle")
    assert report.passed, "\n".join(report.lines())
    assert ("decoder_image", "the prompt") in {(row.stage, row.case) for row in report.rows}


def test_a_read_only_bundle_keeps_its_receipt_out(sound_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma3_compile.validate import run as module
    from runtimes.errors import BundleError
    from runtimes.progress import Progress

    said: list[str] = []

    class Notes(Progress):
        def note(self, message: str) -> None:
            said.append(message)

    def refuse(*arguments: object) -> None:
        raise BundleError("cannot write: Read-only file system")

    monkeypatch.setattr(module, "replace_file", refuse)
    assert validate(ValidateRequest(bundle=sound_copy), Notes()).passed
    assert said == ["the receipt was not written: cannot write: Read-only file system"]


def test_what_cannot_be_compared_is_refused(int4_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the model it is to be held against"):
        validated(int4_bundle, random_seed=0, size="270m")
    with pytest.raises(UsageError, match="text-only"):
        validated(int4_bundle, images=(tmp_path / "a.png",))
    with pytest.raises(UsageError, match="exclude each other"):
        validated(int4_bundle, checkpoint="a", random_seed=0)
    with pytest.raises(UsageError, match="own weights"):
        validated(int4_bundle, reference="bundle", random_seed=0)
    renamed = Path(shutil.copytree(int4_bundle, tmp_path / "renamed"))
    text = (renamed / "manifest.json").read_text()
    (renamed / "manifest.json").write_text(text.replace('"name": "nano"', '"name": "custom"'))
    with pytest.raises(UsageError, match="no preset"):
        validated(renamed, reference="bundle")
    assert validated(renamed, reference="bundle", size="nano", tokens=8).passed


def test_the_real_270m_on_its_own_grid(gguf_270m_path: Path, tmp_path: Path) -> None:
    """Its embedding has 8 bits, its linear layers 4 with minimums: what is read back is the checkpoint, exactly."""
    out = tmp_path / "270m"
    build(BuildRequest(target="ort", checkpoint=gguf_270m_path, out=out, dtype="auto", activations="int16"))
    report = validated(out, checkpoint=gguf_270m_path, tokens=12)
    assert report.passed, "\n".join(report.lines())
    rows = {(row.stage, row.case): row for row in report.rows}
    assert rows["weights", "kept"].relative_error == 0.0
    assert rows["decoder", "each layer alone"].relative_error < 2e-5
    assert "no text is longer than the window of 512 tokens" in report.notes


def _hash_anew(folder: Path, name: str) -> None:
    """Makes the manifest tell of the file as it is now."""
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["files"][name]["sha256"] = hash_file(folder / name)
    path.write_text(json.dumps(manifest))


def _overwrite(path: Path, name: str, value: float) -> None:
    """Sets a stored fp32 tensor of a safetensors file to one value, in place."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(size))[name]["data_offsets"]
        file.seek(8 + size + begin)
        file.write(np.full((end - begin) // 4, value, dtype="<f4").tobytes())
