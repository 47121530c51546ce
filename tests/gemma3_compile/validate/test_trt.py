"""A bundle for TensorRT on a host that cannot run it: its networks are interpreted, and the report says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from gemma3_compile.cli import run
from gemma3_compile.targets.trt import PLANS
from gemma3_compile.validate import Report, ValidateRequest, opened, validate
from gemma3_compile.validate.report import RECEIPT
from graphs.trt.interpreter import InterpretedBundle, InterpretedSession
from graphs.trt.interpreter.session import InterpretedCaches
from runtimes.bundle import Bundle, hash_file
from runtimes.errors import BundleError, HostError
from runtimes.manifest import MANIFEST_NAME
from runtimes.session import Caches, Chunk, Rows, Session
from tests.gemma3_compile.validate.trt_bundles import build_trt, damage
from tests.graphs.trt.interpreter.stages import tensorrt


def validated(bundle: Path, **options: object) -> Report:
    given = {"provider": "cpu", "write_receipt": False, **options}
    return validate(ValidateRequest(bundle=bundle, **given))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano in bfloat16, every stage. Do not write to it."""
    return build_trt(tmp_path_factory.mktemp("trt") / "nano")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_a_sound_bundle(bundle: Path) -> None:
    report = validated(bundle)
    assert report.passed and report.findings == (), "\n".join(report.lines())
    rows = {(row.stage, row.case): row for row in report.rows}
    assert {stage for stage, _ in rows} == {"weights", "vision", "decoder"}
    assert rows["weights", "bfloat16"].max_error == 0, "the checkpoint is in bfloat16 itself"
    for stage in ("vision", "decoder"):
        assert rows[stage, "each layer alone"].relative_error < 1e-5, "in fp32 the network is the eager model"
    decode = rows["decoder", "decode, a batch of three"]
    assert decode.limits.relative is not None and 0.01 < decode.relative_error < decode.limits.relative < 0.2
    assert ("decoder", "two pictures in a chunk") in rows


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(bundle: Bundle, **options: object) -> Session:
        raise HostError("no NVIDIA driver answers on this host")

    monkeypatch.setattr(opened, "open_session", refuse)


def test_the_report_says_that_no_plan_was_run(copy: Path, capsys: pytest.CaptureFixture[str], no_gpu: None) -> None:
    assert run(["validate", str(copy), "--tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip().endswith("within tolerance (interpreted: the plan itself was not run)")
    assert "note: the plans were not run: torch interpreted the networks that they were built from" in out
    assert "the plans cannot be run here, so their networks are interpreted: no NVIDIA driver answers" in err
    receipt = json.loads((copy / RECEIPT).read_text())
    assert receipt["interpreted"] is True and receipt["passed"] is True
    assert "tensorrt_rtx" in receipt["versions"] and "decoder.plan" not in receipt["bundle"]["sha256"]
    assert Bundle.open(copy).verify().unlisted == ()


def test_a_gpu_that_was_asked_for_is_not_made_up_for(bundle: Path, no_gpu: None) -> None:
    with pytest.raises(HostError, match="no NVIDIA driver"):
        validated(bundle, provider="cuda")


def test_where_the_plans_run_they_are_what_is_compared(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session as strict as that of a plan: few sequences, and logits of a chunk's last token only."""

    class Strict(InterpretedSession):
        def open_caches(self, batch: int, context: int) -> InterpretedCaches:
            assert batch <= 2
            return super().open_caches(batch, context)

        def extend(
            self, caches: Caches, sequence: int, chunk: Chunk, rows: Rows = "last"
        ) -> NDArray[np.float32] | None:
            assert rows == "last"
            return super().extend(caches, sequence, chunk, rows)

    def opens(bundle: Bundle, **options: object) -> Session:
        stages = InterpretedBundle.open(tensorrt(), bundle).session()._stages
        settings = {**bundle.manifest.settings, "max_batch": 2}
        object.__setattr__(bundle.manifest, "settings", settings)
        return Strict(bundle.manifest, stages)

    monkeypatch.setattr(opened, "open_session", opens)
    report = validated(bundle, provider="auto")
    assert report.passed and not report.interpreted, "\n".join(report.lines())
    assert report.conclusion().endswith("within tolerance")
    assert report.notes[0].startswith("the plans ran, 2 sequences at a time; each layer alone is of their networks")
    assert "decoder.plan" in report.bundle["sha256"]


FORMS = {"int8": "8 bits, one scale a row", "int4": "4 bits", "fp8": "e4m3, one scale a row"}


@pytest.mark.parametrize(("dtype", "weights"), [("int8", "input"), ("fp8", "input"), ("int4", "constant")])
def test_rounded_weights_are_told_from_a_wrong_graph(tmp_path: Path, dtype: str, weights: str) -> None:
    """int4 as constants: TensorRT's copy of them is read from the graph's external data."""
    report = validated(build_trt(tmp_path / dtype, dtype=dtype, weights=weights))
    assert report.passed, "\n".join(report.lines())
    rows = {(row.stage, row.case, row.against): row for row in report.rows}
    rounded = rows["weights", FORMS[dtype], "checkpoint"]
    assert 1e-3 < rounded.relative_error < 0.2
    assert rows["decoder", "each layer alone", "own weights"].relative_error < 1e-5
    case = "decode, a batch of three"
    own, original = (rows["decoder", case, against].divergence for against in ("own weights", "checkpoint"))
    assert own is not None and original is not None and own.kl_mean < 1e-3 and 2 * own.kl_mean < original.kl_mean


def without_the_factor(model: onnx.ModelProto) -> None:
    """Frequencies of global layers are not divided by 8."""
    (table,) = (
        t for t in model.graph.initializer if list(t.dims) == [16] and numpy_helper.to_array(t).flat[0] == 0.125
    )
    table.raw_data = (8 * numpy_helper.to_array(table)).astype(np.float32).tobytes()


def other_scale(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "SlidingWindowAttention":
            next(a for a in node.attribute if a.name == "scale").f = 0.25


def test_a_wrong_number_in_the_graph_is_found_and_named(copy: Path) -> None:
    damage(copy, without_the_factor)
    report = validated(copy)
    assert not report.passed
    assert {finding.cause for finding in report.findings} == {"rope scale"}
    assert report.findings[0].place == "layer 5 (global)"
    assert report.conclusion().endswith("(rope scale) (interpreted: the plan itself was not run)")
    bad = {row.case for row in report.rows if not row.passed}
    assert {"each layer alone", "text in chunks"} <= bad


def test_a_plan_of_another_network_is_refused(copy: Path) -> None:
    """The plan has the scale that the build wrote down, the graph has another."""
    damage(copy, other_scale)
    with pytest.raises(BundleError, match="plan of the stage 'decoder' was built from another network than its graph"):
        validated(copy)


def test_plans_of_another_version_are_told_apart(copy: Path) -> None:
    """Where another TensorRT reads the graph into other layers, that is said."""
    damage(copy, other_scale)
    path = copy / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["settings"]["tensorrt_version"] = "1.6.0"
    path.write_text(json.dumps(manifest))
    report = validated(copy, tokens=12)
    assert not report.passed and {finding.cause for finding in report.findings} == {"attention scale"}
    assert any("reads decoder into other layers than tensorrt_rtx 1.6.0 did" in note for note in report.notes)


def test_nothing_told_of_a_plan(copy: Path) -> None:
    plans = json.loads((copy / PLANS).read_text())
    del plans["vision"]
    (copy / PLANS).write_text(json.dumps(plans))
    path = copy / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["files"][PLANS] = {"sha256": hash_file(copy / PLANS), "bytes": (copy / PLANS).stat().st_size}
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="says nothing of the stage 'vision'"):
        validated(copy)


def test_the_real_270m_in_bfloat16(gguf_270m_path: Path, tmp_path: Path) -> None:
    """Trained weights, 18 layers, a vocabulary of 262,144; a few dozen tokens in chunks and steps."""
    out = build_trt(tmp_path / "270m", checkpoint=gguf_270m_path, context=1024, dtype="bfloat16")
    report = validated(out, reference="bundle", tokens=12)
    assert report.passed, "\n".join(report.lines())
    rows = {(row.stage, row.case): row for row in report.rows}
    assert rows["decoder", "each layer alone"].relative_error < 1e-5
    decode = rows["decoder", "decode, a batch of three"]
    assert decode.relative_error < 0.03 and decode.divergence is not None and decode.divergence.kl_mean < 5e-3
