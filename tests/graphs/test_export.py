"""torch.export of nano's stages: signatures, dimensions that stay dynamic, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from gemma3_compile.model import Gemma3
from graphs.export import EXAMPLE_SIZES, export_stage
from graphs.ops import gemma3c
from graphs.stages import Stage, TensorSpec
from runtimes.errors import ExportError
from tests.graphs.nano import STAGES, eager_outputs, exported, nano_stage, part_of, raw_program, reader, stage_inputs
from tests.tolerances import check


@pytest.mark.parametrize("stage", STAGES)
def test_a_dimension_is_dynamic_where_the_contract_says_so(stage: str) -> None:
    """A symbol of the contract is a symbol of the graph, equal symbols are one, and everything else is a number."""
    contract = nano_stage(stage)
    seen: dict[str, set[str]] = {}
    for node, spec in zip(raw_program(stage).input_nodes(), contract.inputs, strict=True):
        for dim, found in zip(spec.shape, node.meta["val"].shape, strict=True):
            if isinstance(dim, str):
                assert not isinstance(found, int), f"{spec.name}: {dim} became {found}"
                seen.setdefault(dim, set()).add(str(found))
            else:
                assert found == dim, spec.name
    assert all(len(symbols) == 1 for symbols in seen.values()), seen
    assert len({next(iter(symbols)) for symbols in seen.values()}) == len(seen), "two dimensions are one symbol"


SIZES: list[tuple[str, dict[str, int]]] = [
    ("decoder", {"B": 1, "S": 1, "R": 1, "L": 16, "C": 16}),
    ("decoder", {"B": 4, "S": 33, "R": 32, "L": 16, "C": 64}),
    ("decoder_image", {"B": 1, "S": 6, "R": 1, "L": 16, "C": 33, "M": 1}),
    ("decoder_image", {"B": 3, "S": 21, "R": 21, "L": 16, "C": 48, "M": 12}),
    ("vision", {"N": 1}),
    ("vision", {"N": 4}),
]


@pytest.mark.parametrize(("stage", "sizes"), SIZES)
def test_the_graph_runs_at_other_sizes(stage: str, sizes: dict[str, int], nano_model: Gemma3) -> None:
    """None of the sizes is the traced example's, 1 among them."""
    assert all(EXAMPLE_SIZES[symbol] != size for symbol, size in sizes.items())
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Tensor] = {}
    for spec in nano_stage(stage).inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        whole = spec.dtype == "int64"
        inputs[spec.name] = torch.zeros(shape, dtype=torch.int64) if whole else torch.randn(shape, generator=generator)
    if stage != "vision":
        inputs["token_ids"] = torch.randint(500, inputs["token_ids"].shape, generator=generator)
        inputs["length"] = torch.full_like(inputs["length"], sizes["S"])
    ours, expected = raw_program(stage).run(inputs, reader(nano_model)), eager_outputs(nano_model, stage, inputs)
    for name, value in expected.items():
        check("graph.exact", ours[name], value, f"{stage}/{name} at {sizes}")


@pytest.mark.parametrize("stage", STAGES)
def test_weights_carry_canonical_names_and_no_data(stage: str, nano_model: Gemma3) -> None:
    program = raw_program(stage)
    expected = {name for name in nano_model.state_dict() if name.startswith(f"{part_of(stage)}.")}
    assert {weight.name for weight in program.weights.values()} == expected
    for weight in program.weights.values():
        assert (weight.shape, weight.dtype) == (tuple(nano_model.state_dict()[weight.name].shape), "float32")
    assert all(isinstance(value, FakeTensor) for value in exported(stage).state_dict.values())


def test_each_layer_is_one_attention_node() -> None:
    targets = [node.target for node in raw_program("decoder").graph.nodes]
    assert targets.count(gemma3c.sliding_window_attention.default) == 5
    assert targets.count(gemma3c.global_attention.default) == 1
    assert targets.count(gemma3c.rotary_table.default) == 2, "one table for each kind of layer, not for each layer"
    vision = [node.target for node in raw_program("vision").graph.nodes]
    assert vision.count(gemma3c.siglip_pool.default) == 1


def test_a_model_that_cannot_be_traced_is_an_export_error() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if x.sum() > 0 else x

    pixels = TensorSpec(name="pixels", dtype="float32", shape=("N", 3))
    stage = Stage(name="vision", inputs=(pixels,), outputs=(pixels,))
    with pytest.raises(ExportError, match=r"torch\.export of stage `vision` failed: .*data-dependent") as caught:
        export_stage(Branches(), stage)
    assert caught.value.hint is not None and caught.value.__cause__ is not None


def test_a_dimension_that_a_model_fixes_is_an_export_error() -> None:
    """The contract says that N is open, the model works for one N only."""

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 3) + torch.zeros(2, 3)

    pixels = TensorSpec(name="pixels", dtype="float32", shape=("N", 3))
    with pytest.raises(ExportError, match="stage `vision` failed"):
        export_stage(Fixed(), Stage(name="vision", inputs=(pixels,), outputs=(pixels,)))


def test_inputs_for_the_other_tests_are_no_example(nano_model: Gemma3) -> None:
    """The sizes that the passes are tested with differ from the traced ones."""
    shapes = {name: tuple(x.shape) for name, x in stage_inputs("decoder_image").items()}
    assert shapes["token_ids"] == (3, 7) != (EXAMPLE_SIZES["B"], EXAMPLE_SIZES["S"])
