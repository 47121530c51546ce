"""The pass ``select_rows_early``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphs.passes.select_rows_early import run
from tests.graphs.small import Small, small_program

aten = torch.ops.aten
DIM = 16


class Tail(nn.Module):
    """What follows a last attention: a linear, a residual sum, a feed-forward, and the choice of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.up = nn.Linear(DIM, 2 * DIM, bias=False)
        self.down = nn.Linear(2 * DIM, DIM, bias=False)
        self.scale = nn.Parameter(torch.randn(DIM))

    def stream(self, x_BSH: Tensor, attended_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.out(attended_BSH)
        normed = F.rms_norm(x_BSH, (DIM,), self.scale, 1e-6)
        return x_BSH + self.down(F.gelu(self.up(normed), approximate="tanh"))

    def forward(self, x_BSH: Tensor, attended_BSH: Tensor, rows_BR: Tensor) -> tuple[Tensor, ...]:
        y_BSH = self.stream(x_BSH, attended_BSH)
        return (y_BSH.gather(1, rows_BR[:, :, None].expand(-1, -1, DIM)),)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 7, DIM), torch.randn(2, 7, DIM), torch.tensor([[6, 0, 3], [2, 2, 5]])


def gathered(small: Small) -> list[str]:
    """The operands that are gathered from."""
    return [node.args[0].name for node in small.program.graph.nodes if node.target is aten.gather.default]


def test_only_the_inputs_of_the_tail_are_gathered() -> None:
    small = small_program(Tail(), *inputs())
    given = {node.name for node in small.program.input_nodes()[:2]}
    assert run(small.program).changed == 7
    small.program.graph.lint()
    assert set(gathered(small)) == given and len(gathered(small)) == 2
    (ours,) = small.outputs()
    torch.testing.assert_close(ours, small.expected[0], rtol=1e-6, atol=1e-6)


def test_a_probe_follows_to_the_wanted_rows() -> None:
    small = small_program(Tail(), *inputs())
    last = [node for node in small.program.graph.nodes if node.target is aten.add.Tensor][-1]
    small.program.probes = {"layers.0": last}
    run(small.program)
    probe = small.program.probes["layers.0"]
    assert probe in small.program.graph.nodes and probe.meta["val"].shape == (2, 3, DIM)


def test_what_something_else_reads_stays_whole() -> None:
    class Twice(Tail):
        def forward(self, x_BSH: Tensor, attended_BSH: Tensor, rows_BR: Tensor) -> tuple[Tensor, ...]:
            y_BSH = self.stream(x_BSH, attended_BSH)
            return y_BSH.gather(1, rows_BR[:, :, None].expand(-1, -1, DIM)), y_BSH * 2

    small = small_program(Twice(), *inputs())
    assert run(small.program).changed == 0
    assert small.same_as_before()


def test_an_operand_that_is_broadcast_over_the_tokens_stays_before() -> None:
    class Broadcast(nn.Module):
        def forward(self, x_BSH: Tensor, one_B1H: Tensor, rows_BR: Tensor) -> tuple[Tensor, ...]:
            return ((x_BSH + one_B1H).gather(1, rows_BR[:, :, None].expand(-1, -1, DIM)),)

    small = small_program(Broadcast(), torch.randn(2, 7, DIM), torch.randn(2, 1, DIM), inputs()[2])
    assert run(small.program).changed == 0
    assert small.same_as_before()


def test_without_a_choice_of_rows_nothing_changes() -> None:
    small = small_program(lambda x: (F.gelu(x),), torch.randn(2, 7, DIM))
    assert run(small.program).changed == 0
    assert small.same_as_before()
