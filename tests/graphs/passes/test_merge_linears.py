"""The pass ``merge_linears``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphs.passes.merge_linears import run
from graphs.weights import BlockFormat
from tests.graphs.small import Small, small_program
from tests.tolerances import check

INT4 = BlockFormat(bits=4, block_size=32, zero_points="integer")
INT8 = BlockFormat(bits=8, block_size=32, zero_points="none")
X = (2, 5, 32)


class Heads(nn.Module):
    """Three linears of unequal width over one input, in a module ``attn``."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.attn = nn.Module()
        for name, rows in (("q_proj", 48), ("k_proj", 16), ("v_proj", 24)):
            self.attn.add_module(name, nn.Linear(32, rows, bias=bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.attn.q_proj(x), self.attn.k_proj(x) * 2, self.attn.v_proj(x)


def linears(small: Small) -> int:
    return sum(node.target is torch.ops.aten.linear.default for node in small.program.graph.nodes)


def check_same(small: Small) -> None:
    for ours, theirs in zip(small.outputs(), small.expected, strict=True):
        check("graph.stacked", ours, theirs)


def test_three_become_one() -> None:
    small = small_program(Heads(), torch.randn(X))
    result = run(small.program)
    small.program.graph.lint()
    assert (result.changed, result.refused, linears(small)) == (1, [], 1)
    (weight,) = small.program.weights.values()
    assert weight.sources == ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight")
    assert (weight.name, weight.shape) == ("attn.q_proj+k_proj+v_proj.weight", (88, 32))
    check_same(small)


def test_the_format_goes_along() -> None:
    formats = {f"attn.{name}_proj.weight": INT4 for name in "qkv"}
    small = small_program(Heads(), torch.randn(X), formats=formats)
    assert run(small.program).changed == 1
    (weight,) = small.program.weights.values()
    assert weight.format == INT4


def test_a_dynamic_chunk_stays_dynamic() -> None:
    small = small_program(Heads(), torch.randn(X), dynamic=[{0: "B", 1: "S"}])
    run(small.program)
    x = torch.randn(4, 9, 32)
    out = small.program.run({"in.0": x}, small.read)
    assert [tuple(value.shape) for value in out.values()] == [(4, 9, 48), (4, 9, 16), (4, 9, 24)]


def test_different_formats_are_refused() -> None:
    formats = {"attn.q_proj.weight": INT4, "attn.k_proj.weight": INT4, "attn.v_proj.weight": INT8}
    small = small_program(Heads(), torch.randn(X), formats=formats)
    (reason,) = run(small.program).refused
    assert reason.startswith(
        "attn.q_proj.weight+attn.k_proj.weight+attn.v_proj.weight: formats differ (BlockFormat(bits=4"
    )
    assert linears(small) == 3 and small.same_as_before()


def test_a_quantised_beside_a_plain_one_is_refused() -> None:
    small = small_program(Heads(), torch.randn(X), formats={"attn.q_proj.weight": INT8})
    (reason,) = run(small.program).refused
    assert "formats differ" in reason and reason.endswith("float32, float32)")


def test_biases_are_refused() -> None:
    small = small_program(Heads(bias=True), torch.randn(X))
    result = run(small.program)
    assert (result.changed, linears(small)) == (0, 3)
    assert result.refused == ["attn.q_proj.weight+attn.k_proj.weight+attn.v_proj.weight: they have biases"]
    assert small.same_as_before()


def test_different_modules_are_refused() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.Module(), nn.Module()
            self.attn.add_module("q_proj", nn.Linear(32, 16, bias=False))
            self.mlp.add_module("up_proj", nn.Linear(32, 16, bias=False))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attn.q_proj(x), self.mlp.up_proj(x)

    small = small_program(Apart(), torch.randn(X))
    (reason,) = run(small.program).refused
    assert "they belong to different modules" in reason and linears(small) == 2


def test_linears_over_different_inputs_are_left_without_a_word() -> None:
    class Chain(Heads):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attn.q_proj(x), self.attn.k_proj(x + 1)

    small = small_program(Chain(), torch.randn(X))
    result = run(small.program)
    assert (result.changed, result.refused, linears(small)) == (0, [], 2)


def test_an_input_computed_late_and_an_output_used_early() -> None:
    """The product stands where the first of the linears stood: after its input, before every use."""

    class Late(Heads):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            q = self.attn.q_proj(y).sum()
            return self.attn.k_proj(y) * q

    small = small_program(Late(), torch.randn(X))
    assert run(small.program).changed == 1
    small.program.graph.lint()
    check_same(small)
