"""The pass ``fuse_add_norm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphs.ops import gemma3c
from graphs.passes.fuse_add_norm import run
from tests.graphs.small import Small, small_program

DIM = 16


class Normed(nn.Module):
    """A residual addition and the norm that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(DIM), requires_grad=False)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return F.rms_norm(total, (DIM,), self.scale, 1e-6), total * 2


def pair(shape: tuple[int, ...] = (2, 3, DIM)) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape)


def fused(small: Small) -> int:
    return sum(node.target is gemma3c.add_rms_norm.default for node in small.program.graph.nodes)


def test_both_results_come_from_one_node() -> None:
    small = small_program(Normed(), *pair())
    result = run(small.program)
    small.program.graph.lint()
    assert (result.changed, result.refused, fused(small)) == (1, [], 1)
    targets = {node.target for node in small.program.graph.nodes}
    assert not targets & {torch.ops.aten.add.Tensor, torch.ops.aten.rms_norm.default}
    assert small.same_as_before()


def test_a_probe_follows_the_sum() -> None:
    small = small_program(Normed(), *pair())
    total = next(node for node in small.program.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    small.program.probes = {"layers.0": total}
    run(small.program)
    probe = small.program.probes["layers.0"]
    assert probe in small.program.graph.nodes and probe.args[1] == 1
    assert probe.args[0].target is gemma3c.add_rms_norm.default


def test_a_second_norm_of_the_sum_stays_a_norm() -> None:
    class Two(Normed):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            total = a + b
            return F.rms_norm(total, (DIM,), self.scale, 1e-6), F.rms_norm(total, (DIM,), self.scale * 2, 1e-6)

    small = small_program(Two(), *pair())
    assert run(small.program).changed == 1
    small.program.graph.lint()
    assert small.same_as_before()


def refusal(small: Small) -> str:
    result = run(small.program)
    assert (result.changed, fused(small)) == (0, 0)
    assert small.same_as_before()
    (reason,) = result.refused
    return reason


def test_a_sum_with_a_number_is_refused() -> None:
    class Shifted(Normed):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.rms_norm(a + 0.5, (DIM,), self.scale, 1e-6) * b

    assert "not the plain sum of two tensors" in refusal(small_program(Shifted(), *pair()))


def test_a_sum_with_alpha_is_refused() -> None:
    class Weighted(Normed):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.rms_norm(torch.add(a, b, alpha=2), (DIM,), self.scale, 1e-6)

    assert "not the plain sum of two tensors" in refusal(small_program(Weighted(), *pair()))


def test_shapes_that_broadcast_are_refused() -> None:
    small = small_program(Normed(), torch.randn(2, 3, DIM), torch.randn(DIM))
    assert "shapes differ, (2, 3, 16) and (16,)" in refusal(small)


def test_a_norm_without_scale_is_refused() -> None:
    class Bare(Normed):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.rms_norm(a + b, (DIM,), eps=1e-6)

    assert "has no scale or no epsilon" in refusal(small_program(Bare(), *pair()))


def test_a_sum_read_before_its_norm_is_refused() -> None:
    """The fused node stands at the norm, so the sum would come too late."""

    class Early(Normed):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            total = a + b
            doubled = total * 2
            return doubled, F.rms_norm(total, (DIM,), self.scale, 1e-6)

    assert "read before" in refusal(small_program(Early(), *pair()))


def test_a_norm_of_something_else_is_left_without_a_word() -> None:
    class Product(Normed):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.rms_norm(a * b, (DIM,), self.scale, 1e-6)

    small = small_program(Product(), *pair())
    result = run(small.program)
    assert (result.changed, result.refused) == (0, [])
