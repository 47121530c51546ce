"""The pass ``drop_noops``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphs.passes.drop_noops import run
from tests.graphs.small import Small, small_program

aten = torch.ops.aten


def targets(small: Small) -> list[object]:
    return [node.target for node in small.program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x.float() + 1, id="cast to its own dtype"),
        pytest.param(lambda x: x[:] + 1, id="slice of everything"),
        pytest.param(lambda x: x.float()[:].float()[:] + 1, id="several in a row"),
    ],
)
def test_goes(function: object) -> None:
    small = small_program(function, torch.randn(4, 6))
    result = run(small.program)
    assert result.changed >= 1
    assert targets(small) == [aten.add.Tensor]
    assert small.same_as_before()


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        pytest.param(lambda x: x.double() + 1, aten.to.dtype, id="cast to another dtype"),
        pytest.param(lambda x: x[1:] + 1, aten.slice.Tensor, id="slice without the first row"),
        pytest.param(lambda x: x[:3] + 1, aten.slice.Tensor, id="slice of some rows"),
        pytest.param(lambda x: x[::2] + 1, aten.slice.Tensor, id="every other row"),
    ],
)
def test_stays(function: object, kept: object) -> None:
    small = small_program(function, torch.randn(4, 6))
    run(small.program)
    assert kept in targets(small)
    assert small.same_as_before()


def test_metadata_assertions_go() -> None:
    small = small_program(lambda x: x.double() * 2, torch.randn(3))
    assert aten._assert_tensor_metadata.default in targets(small), "torch.export does not write what is to go"
    run(small.program)
    assert aten._assert_tensor_metadata.default not in targets(small)
    assert small.same_as_before()


def test_contiguous_goes() -> None:
    """The values are the same; no target keeps torch's strides."""
    small = small_program(lambda x: x.transpose(0, 1).contiguous() + 1, torch.randn(4, 6))
    assert aten.contiguous.default in targets(small), "torch.export does not write what is to go"
    run(small.program)
    assert targets(small) == [aten.transpose.int, aten.add.Tensor]
    assert small.same_as_before()


def test_an_output_may_be_a_noop() -> None:
    def function(x: Tensor) -> Tensor:
        return (x + 1)[:]

    small = small_program(function, torch.randn(3))
    assert run(small.program).changed == 1
    assert small.same_as_before()
