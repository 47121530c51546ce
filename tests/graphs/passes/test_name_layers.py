"""The pass ``name_layers``: probes on the residual stream after each layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from gemma3_compile.model import Gemma3
from graphs.passes.name_layers import run
from graphs.program import Program
from tests.graphs.nano import eager_outputs, nano_program, part_of, reader, stage_inputs
from tests.graphs.small import small_program
from tests.tolerances import check

LAYERS = {"decoder": 6, "decoder_image": 6, "vision": 2}


class Recorder(fx.Interpreter):
    """Keeps what some nodes compute."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.names = {node: name for name, node in program.probes.items()}
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self.names:
            self.seen[self.names[n]] = value
        return value


@pytest.mark.parametrize("stage", LAYERS)
def test_a_probe_holds_the_residual_stream_of_its_layer(stage: str, nano_model: Gemma3) -> None:
    """After all passes, compared with what each layer of the eager model gives."""
    program, inputs = nano_program(stage), stage_inputs(stage)
    assert list(program.probes) == [f"layers.{i}" for i in range(LAYERS[stage])]
    expected: list[Tensor] = []
    part = getattr(nano_model, part_of(stage))
    hooks = [
        layer.register_forward_hook(lambda _, __, out: expected.append(out[0] if isinstance(out, tuple) else out))
        for layer in part.layers
    ]
    try:
        eager_outputs(nano_model, stage, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    recorder, read = Recorder(program), reader(nano_model)
    names = dict(zip(program.input_nodes(), program.stage.inputs, strict=True))
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    recorder.run(*(inputs[names[n].name] if n in names else read(program.weights[n.name]) for n in placeholders))
    if "rows" in inputs:  # the pass select_rows_early leaves the last layer with the rows that are asked for
        expected[-1] = torch.stack([one[rows] for one, rows in zip(expected[-1], inputs["rows"], strict=True)])
    for index, value in enumerate(expected):
        check("graph.stacked", recorder.seen[f"layers.{index}"], value, f"{stage}: layer {index}")


def test_a_program_without_layers_has_no_probes() -> None:
    small = small_program(lambda x: x * 2, torch.zeros(2))
    assert run(small.program).changed == 0
    assert small.program.probes == {}
