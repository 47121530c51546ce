"""The table, the conclusion and the receipt; limits that add up; and the page that explains them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from gemma3_compile.numerics import Divergence
from gemma3_compile.validate import vision_alone
from gemma3_compile.validate.diagnosis import beyond_the_layers
from gemma3_compile.validate.hypotheses import HEAD, LAYER
from gemma3_compile.validate.report import Finding, Report, Row
from gemma3_compile.validate.tolerances import ACTIVATIONS, GRAPH, WEIGHTS, feature_limits, logit_limits
from runtimes.manifest import Manifest
from tests.runtimes.manifests import manifest

PAGE = Path(__file__).parents[3] / "docs" / "numerics.md"
FOUND = Divergence(rows=4, kl_mean=1e-3, kl_max=2e-3, top1=0.75, margin_median=2.0, flip_margin_max=0.5)


def row(against: str = "own weights", **changes: object) -> Row:
    sound = Row(
        stage="decoder",
        case="text in chunks",
        against=against,
        rows=4,
        max_error=0.5,
        relative_error=0.1,
        limits=GRAPH,
        divergence=FOUND,
    )
    return replace(sound, **changes)  # type: ignore[arg-type]


def report(*rows: Row, findings: tuple[Finding, ...] = ()) -> Report:
    return Report(
        bundle={"name": "b"}, references=("r",), inputs={}, versions={}, rows=rows, findings=findings, notes=("a note",)
    )


def quantised(dtype: str, activations: str | None) -> Manifest:
    plain = manifest()
    settings = {} if activations is None else {"activations": activations}
    return replace(plain, weights=replace(plain.weights, dtype=dtype), settings=settings)  # type: ignore[arg-type]


def test_columns_line_up_and_the_last_line_concludes() -> None:
    lines = list(report(row(), row(case="x", divergence=None, max_error=None)).lines())
    assert lines[0].index("rows") + 4 == lines[1].index("   4") + 4 == lines[2].index("   4") + 4
    assert lines[1].endswith("75.0%   0.5  ok") and lines[2].endswith("–  ok")
    assert lines[-2:] == ["note: a note", "sound: all 2 comparisons are within tolerance"]


def test_what_is_beyond_is_said_with_its_limit() -> None:
    beyond = GRAPH.beyond(0.1, FOUND)
    assert beyond == ("relative error 0.1 > 0.0001", "mean KL 0.001 > 1e-06")
    finding = Finding(stage="decoder", place="layer 5", cause="rope scale", sentence="s", evidence=("e",))
    bad = report(row(), row(beyond=beyond), findings=(finding,))
    assert not bad.passed
    assert bad.conclusion() == "not sound: 1 of 2 comparisons are beyond tolerance (rope scale)"
    assert list(bad.lines())[-4:-2] == ["decoder, layer 5: rope scale: s", "    e"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_passes_that_is_none(value: float) -> None:
    assert GRAPH.beyond(value, None)
    assert GRAPH.beyond(0.0, replace(FOUND, kl_mean=value))


def test_the_receipt_is_plain_json() -> None:
    data = json.loads(report(row(relative_error=math.inf, beyond=("x",))).receipt())
    assert data["passed"] is False and data["rows"][0]["relative_error"] == "inf"
    assert data["rows"][0]["limits"]["reason"] == GRAPH.reason


def test_limits_follow_what_is_rounded_and_add_up() -> None:
    assert logit_limits(quantised("float32", None), exact=False) is GRAPH
    assert feature_limits(quantised("float32", None), exact=True) is GRAPH
    exact = logit_limits(quantised("int4", "int16"), exact=True)
    assert (exact.relative, exact.kl_mean) == (2e-3, ACTIVATIONS["int16"].kl_mean)
    both = logit_limits(quantised("int4", "int8"), exact=False)
    assert both.relative is None
    assert both.kl_mean == pytest.approx(ACTIVATIONS["int8"].kl_mean + WEIGHTS["int4"].kl_mean)
    assert feature_limits(quantised("int8", "int8"), exact=False).relative == pytest.approx(0.15)


def test_passages_that_part_while_layers_agree() -> None:
    bad = row(beyond=("relative error 0.1 > 0.0001",))
    assert beyond_the_layers([row()], "own weights", None) == []
    assert beyond_the_layers([bad], "own weights", None)[0].cause == "runtime"
    assert beyond_the_layers([bad], "own weights", "int8")[0].cause == "activations"
    assert (
        beyond_the_layers([row(), replace(bad, against="checkpoint")], "own weights", "int8")[0].cause == "quantisation"
    )


def test_the_page_explains_every_cause_and_limit() -> None:
    page = PAGE.read_text(encoding="utf-8")
    causes = {h.cause for h in (*LAYER, *HEAD, *vision_alone.LAYER, *vision_alone.POOL)}
    assert not [cause for cause in causes if f"`{cause}`" not in page]
    for cost in (*ACTIVATIONS.values(), *WEIGHTS.values()):
        assert f"KL {cost.kl_mean:g}".replace("1e-05", "1e-5") in page
