"""The driver of the passes, and all of them together on every stage of nano."""

from __future__ import annotations

import pytest
import torch

import graphs.passes
from gemma3_compile.model import Gemma3
from graphs.passes import PASSES, run_passes
from graphs.passes.base import Pass, PassResult
from graphs.program import Program
from runtimes.errors import ExportError, UsageError
from tests.graphs.nano import STAGES, eager_outputs, nano_stage, raw_program, reader, stage_inputs
from tests.graphs.small import small_program
from tests.tolerances import check

NAMES = [step.name for step in PASSES]


def check_stage(program: Program, model: Gemma3, row: str, what: str) -> None:
    name = program.stage.name
    inputs = stage_inputs(name)
    ours, expected = program.run(inputs, reader(model)), eager_outputs(model, name, inputs)
    for output in nano_stage(name).outputs:
        check(row, ours[output.name], expected[output.name], f"{what}: {name}/{output.name}")


@pytest.mark.parametrize("stage", STAGES)
def test_after_each_pass_the_graph_computes_what_eager_computes(stage: str, nano_model: Gemma3) -> None:
    """To the bit, until linears are stacked: a product of another shape may sum in another order."""
    program = raw_program(stage)
    check_stage(program, nano_model, "graph.exact", "no pass")
    exact = True
    for step in PASSES:
        result = step.run(program)
        program.graph.lint()
        exact = exact and (step.name != "merge_linears" or not result.changed)
        check_stage(program, nano_model, "graph.exact" if exact else "graph.stacked", f"after {step.name}")


@pytest.mark.parametrize("left_out", NAMES)
def test_a_pass_can_be_left_out(left_out: str, nano_model: Gemma3) -> None:
    program = raw_program("decoder")
    results = run_passes(program, without=[left_out])
    assert list(results) == [name for name in NAMES if name != left_out]
    check_stage(program, nano_model, "graph.stacked", f"without {left_out}")


def test_what_the_passes_do_to_the_text_decoder() -> None:
    """Six layers: seven norms with offsets each and one more, two groups of linears, two fused additions; the last layer's tail moves."""
    results = run_passes(raw_program("decoder"))
    changed = {name: result.changed for name, result in results.items()}
    assert changed | {"drop_noops": 0} == {
        "drop_noops": 0,
        "name_layers": 6,
        "fold_norm_offset": 6 * 6 + 1,
        "select_rows_early": 11,  # o_proj, three norms, two sums, five of the feed-forward
        "merge_linears": 6 * 2,
        "fuse_add_norm": 6 * 2,  # the last sum meets the final norm where the rows were picked before
    }
    assert changed["drop_noops"] > 0
    assert not any(result.refused for result in results.values())


def test_an_unknown_name_raises() -> None:
    with pytest.raises(UsageError, match="unknown pass: fold_norms, nothing") as caught:
        run_passes(raw_program("vision"), without=["nothing", "fold_norms", "drop_noops"])
    assert caught.value.hint is not None and "fold_norm_offset" in caught.value.hint


def test_a_failing_pass_is_named_with_those_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Program) -> PassResult:
        raise KeyError("val")

    broken = Pass(name="broken", run=fail)
    monkeypatch.setattr(graphs.passes, "PASSES", (*PASSES[:2], broken, *PASSES[2:]))
    small = small_program(lambda x: x + 1.0, torch.zeros(3))
    expected = r"pass `broken` failed on stage `decoder` after \['drop_noops', 'name_layers'\]: 'val'"
    with pytest.raises(ExportError, match=expected) as caught:
        run_passes(small.program)
    assert caught.value.hint is not None and "broken" in caught.value.hint


def test_a_pass_that_leaves_a_broken_graph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def reverse(program: Program) -> PassResult:
        """Puts the last node before everything it reads."""
        *_, last, _ = program.graph.nodes
        next(iter(program.graph.nodes)).prepend(last)
        return PassResult(changed=1)

    monkeypatch.setattr(graphs.passes, "PASSES", (Pass(name="reverse", run=reverse),))
    with pytest.raises(ExportError, match="pass `reverse` failed"):
        run_passes(small_program(lambda x: x + 1.0, torch.zeros(3)).program)
