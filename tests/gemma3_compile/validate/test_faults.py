"""A planted fault is caught, and named: exactly that one, in exactly those layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from gemma3_compile.cli import run
from gemma3_compile.validate import ValidateRequest, validate
from tests.gemma3_compile.validate import faults
from tests.gemma3_compile.validate.faults import Plant, build_nano


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A fault, and the findings that must come of it: (stage, place, cause, words of the sentence)."""

    plant: Plant
    findings: tuple[tuple[str, str, str, str], ...]
    stages: str = "text"
    evidence: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)


def _mask_and_pooling(patch: pytest.MonkeyPatch) -> None:
    faults.causal_image_mask(patch)
    faults.transposed_pooling(patch)


FAULTS: Mapping[str, Planted] = MappingProxyType(
    {
        "rope factor 1": Planted(
            plant=faults.rope_factor_one,
            findings=(("decoder", "layer 5 (global)", "rope scale", "1 on a global layer"),),
            evidence="sound in decoder: local layers 0-4",
        ),
        "window one too short": Planted(
            plant=faults.window(-1),
            findings=(("decoder", "layer 0 (local)", "window", "one token too short"),),
            evidence="in decoder: local layers 0-4",
        ),
        "window one too long": Planted(
            plant=faults.window(1),
            findings=(("decoder", "layer 0 (local)", "window", "one token too long"),),
            evidence="the first at position 17",
        ),
        "norm without +1": Planted(
            plant=faults.norm_without_one,
            findings=(
                ("decoder", "layer 0 (local)", "norm (1 + w)", "every norm multiplies by w instead of 1 + w"),
                ("decoder", "head", "norm (1 + w)", "the final norm multiplies by w instead of 1 + w"),
            ),
            evidence="in decoder: local layers 0-4, global layer 5",
        ),
        "norm written without +1": Planted(
            plant=faults.written_without_one,
            findings=(("weights", "37 of 80 tensors (kept)", "norm (1 + w)", "not what the checkpoint holds"),),
            evidence="holds w where 1 + w belongs",
        ),
        "embedding unscaled": Planted(
            plant=faults.unscaled_embedding,
            findings=(("decoder", "layer 0 (local)", "embed scale", "not multiplied by the root"),),
        ),
        "image mask causal, pooling transposed": Planted(
            plant=_mask_and_pooling,
            stages="all",
            findings=(
                ("vision", "pooling", "pooling", "column by column"),
                ("decoder_image", "layer 0 (local)", "image mask", "causal among the tokens of a picture"),
            ),
            evidence="in decoder_image: local layers 0-4, global layer 5",
        ),
        "exact GELU": Planted(
            plant=faults.exact_gelu,
            findings=(("decoder", "layer 0 (local)", "activation", "exact form instead of tanh"),),
        ),
        "rope factor 1 behind rounded weights": Planted(
            plant=faults.rope_factor_one,
            findings=(("decoder", "layer 5 (global)", "rope scale", "1 on a global layer"),),
            request={"dtype": "int4", "activations": "int8"},
        ),
    }
)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = FAULTS[name]
    out = build_nano(tmp_path / "faulty", planted.plant, stages=planted.stages, **planted.request)
    assert run(["validate", str(out), "--no-receipt", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    found = [(finding["stage"], finding["place"], finding["cause"]) for finding in report["findings"]]
    assert found == [expected[:3] for expected in planted.findings], report["findings"]
    for finding, (*_, words) in zip(report["findings"], planted.findings, strict=True):
        assert words in finding["sentence"]
        assert finding["cause"] in report["conclusion"]
    assert any(planted.evidence in line for finding in report["findings"] for line in finding["evidence"])


def test_a_fault_of_one_stage_is_laid_at_its_door(tmp_path: Path) -> None:
    """The stages share caches, and keys that a sound stage wrote must not excuse or accuse another."""
    out = build_nano(tmp_path / "faulty", faults.only_stage("decoder_image", faults.rope_factor_one))
    report = validate(ValidateRequest(bundle=out, write_receipt=False, reference="bundle"))
    assert [(f.stage, f.cause) for f in report.findings] == [("decoder_image", "rope scale")]
    alone = {row.stage: row.passed for row in report.rows if row.case == "each layer alone"}
    assert alone == {"vision": True, "decoder": True, "decoder_image": False}
