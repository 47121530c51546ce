"""Programs: what torch.export made, with inputs, weights and outputs by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphs.program import program_from_export
from graphs.weights import BlockFormat, Weight
from tests.graphs.nano import exported, nano_stage, raw_program, stage_inputs
from tests.graphs.small import small_program

INT8 = BlockFormat(bits=8, block_size=32, zero_points="none")


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight + self.bias, y + x


def test_inputs_come_by_name_in_any_order() -> None:
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    small = small_program(Affine(), x, y)
    outputs = small.program.run({"in.1": y, "in.0": x}, small.read)
    assert list(outputs) == ["out.0", "out.1"]
    assert torch.equal(outputs["out.1"], x + y) and small.same_as_before()


def test_inputs_follow_the_contract() -> None:
    program = raw_program("decoder_image")
    assert len(program.input_nodes()) == len(nano_stage("decoder_image").inputs)
    assert not {node.name for node in program.input_nodes()} & set(program.weights)


def test_a_program_is_a_copy() -> None:
    """Two programs of one export do not see each other's changes."""
    first, second = raw_program("vision"), raw_program("vision")
    before = len(second.graph.nodes)
    for node in reversed(list(first.graph.nodes)):
        if node.op == "call_function" and not node.users:
            first.graph.erase_node(node)
    first.graph.output(None)
    assert len(second.graph.nodes) == before == len(exported("vision").graph_module.graph.nodes)


def test_formats_reach_the_weights() -> None:
    name = "decoder.layers.2.mlp.down_proj.weight"
    program = program_from_export(
        exported("decoder"), nano_stage("decoder"), prefix="decoder.", formats={name: INT8, "vision.other.weight": INT8}
    )
    assert {w.name for w in program.weights.values() if w.format is not None} == {name}


def test_an_added_weight_comes_first_and_is_read_by_its_recipe() -> None:
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    small = small_program(Affine(), x, y)
    program = small.program
    add = next(node for node in program.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    recipe = Weight(sources=("bias",), shape=(4,), dtype="float32", offset=2.0)
    node = program.add_weight(recipe, near=add)
    assert node is next(iter(program.graph.nodes)) and node.meta["val"].shape == (4,)
    add.replace_input_with(add.args[1], node)
    program.drop_dead_weights()
    assert sorted((w.name, w.offset) for w in program.weights.values()) == [("bias", 2.0), ("weight", 0.0)]
    assert torch.equal(small.outputs()[0], x @ small.state["weight"] + (small.state["bias"] + 2))


def test_a_missing_input_is_an_error() -> None:
    inputs = stage_inputs("vision")
    del inputs["pixels"]
    with pytest.raises(KeyError, match="pixels"):
        raw_program("vision").run(inputs, lambda weight: torch.zeros(weight.shape))
