"""The pass ``fold_norm_offset``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphs.passes.drop_noops import run as drop_noops
from graphs.passes.fold_norm_offset import run
from graphs.weights import BlockFormat
from tests.graphs.small import small_program


class Scaled(nn.Module):
    """x * (w + offset) with w in a dtype of its own, cast to fp32 first where ``widen``."""

    def __init__(
        self, *, dtype: torch.dtype = torch.float32, widen: bool = False, shape: tuple[int, ...] = (32,)
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False)
        self.widen = widen

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.float32) if self.widen else self.weight
        return x * (1.0 + weight)


def test_the_offset_moves_into_the_weight() -> None:
    small = small_program(Scaled(), torch.randn(2, 32))
    result = run(small.program)
    assert (result.changed, result.refused) == (1, [])
    (weight,) = small.program.weights.values()
    assert (weight.name, weight.offset, weight.dtype, weight.sources) == ("weight", 1.0, "float32", ("weight",))
    assert torch.ops.aten.add.Tensor not in {node.target for node in small.program.graph.nodes}
    assert small.same_as_before()


def test_through_a_cast_the_weight_becomes_fp32() -> None:
    """bfloat16 + 1 in fp32 needs fp32: the stored dtype says so."""
    small = small_program(Scaled(dtype=torch.bfloat16, widen=True), torch.randn(2, 32))
    drop_noops(small.program)  # an assertion of torch.export's would keep the narrow weight alive
    assert run(small.program).changed == 1
    (weight,) = small.program.weights.values()
    assert (weight.dtype, weight.offset) == ("float32", 1.0)
    outputs = small.program.run(small.inputs, lambda w: small.state["weight"].float() + w.offset)
    assert torch.equal(outputs["out.0"], small.expected[0])


def test_a_weight_with_two_uses_keeps_the_plain_one() -> None:
    class Twice(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1.0 + self.weight) + self.weight

    small = small_program(Twice(), torch.randn(2, 32))
    assert run(small.program).changed == 1
    assert sorted(weight.offset for weight in small.program.weights.values()) == [0.0, 1.0]
    assert small.same_as_before()


def test_a_quantised_weight_is_refused() -> None:
    form = BlockFormat(bits=8, block_size=32, zero_points="none")
    small = small_program(Scaled(shape=(4, 32)), torch.randn(4, 32), formats={"weight": form})
    result = run(small.program)
    assert (result.changed, result.refused) == (0, ["weight: a quantised weight cannot carry an offset"])
    assert small.same_as_before()


def test_a_sum_in_bfloat16_is_refused() -> None:
    small = small_program(Scaled(dtype=torch.bfloat16), torch.randn(2, 32))
    result = run(small.program)
    assert result.changed == 0
    assert result.refused == ["weight: the sum is rounded to torch.bfloat16, and the file would hold it in float32"]


def test_a_sum_with_alpha_is_refused() -> None:
    class Alpha(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.add(self.weight, 1.0, alpha=3)

    small = small_program(Alpha(), torch.randn(2, 32))
    result = run(small.program)
    assert result.changed == 0 and len(result.refused) == 1 and "alpha" in result.refused[0]
    assert small.same_as_before()


def test_other_sums_are_left_without_a_word() -> None:
    small = small_program(lambda x, y: (x + 1.0) * (x + y), torch.randn(3), torch.randn(3))
    result = run(small.program)
    assert (result.changed, result.refused) == (0, [])
