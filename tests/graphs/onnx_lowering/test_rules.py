"""Every rule of the shape and math tables alone: a small function in torch against its graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphs.onnx_lowering import attention_rules, math_rules, ort_rules, shape_rules, trt_plugins, trt_rules
from graphs.onnx_lowering.context import OrtOptions, merge_tables
from graphs.onnx_lowering.lower import ORT_RULES, TRT_RULES, lower_for_ort
from graphs.onnx_lowering.shape_rules import reshape_target
from runtimes.errors import ExportError
from tests.graphs.ort import Stored, lower_and_open, run
from tests.graphs.small import Small, small_program
from tests.tolerances import check

B, S = 2, 5
BS = [{0: "B", 1: "S"}]


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole(*shape: int, high: int = 5) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A function, its inputs, which dimensions stay open, and other inputs to try then."""

    function: Callable[..., object]
    inputs: Sequence[Tensor]
    dynamic: Sequence[Mapping[int, str]] | None = None
    also: Sequence[Tensor] = field(default_factory=tuple)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (8,), torch.arange(8.0), torch.ones(8), 1e-5)


CASES: dict[str, Case] = {
    "split": Case(function=lambda x: torch.split_with_sizes(x, [2, 3, 3], -1), inputs=[floats(B, S, 8)]),
    "split of rows": Case(function=lambda x: torch.split_with_sizes(x, [1, 4]), inputs=[floats(5, 3)]),
    "sizes and expand": Case(
        function=lambda x, y: x.unsqueeze(1).expand(-1, y.shape[0], -1) + 1,
        inputs=[floats(B, 8), floats(S)],
        dynamic=[{0: "B"}, {0: "S"}],
        also=[floats(3, 8), floats(7)],
    ),
    "size of the last dimension": Case(
        function=lambda x: torch.arange(x.shape[-1]) + 1,
        inputs=[floats(B, S)],
        dynamic=[{1: "S"}],
        also=[floats(B, 9)],
    ),
    "static expand": Case(function=lambda x: x[:, None].expand(-1, 3, -1) * 2, inputs=[floats(B, 8)]),
    "view": Case(
        function=lambda x: x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2) + 1,
        inputs=[floats(B, S, 8)],
        dynamic=BS,
        also=[floats(3, 4, 8)],
    ),
    "view to heads and back": Case(
        function=lambda x: (x.view(x.shape[0], x.shape[1], 4, 2).flatten(2) + 1, x * 2),
        inputs=[floats(B, S, 8)],
        dynamic=BS,
        also=[floats(1, 3, 8)],
    ),
    "reshape of what was moved": Case(function=lambda x: x.transpose(1, 2).reshape(2, 20), inputs=[floats(2, S, 4)]),
    "transpose from the end": Case(function=lambda x: x.transpose(-1, -3) * 1.5, inputs=[floats(B, S, 4)]),
    "contiguous": Case(function=lambda x: x.transpose(0, 1).contiguous() + 1, inputs=[floats(B, S)]),
    "unsqueeze at the end": Case(function=lambda x: x.unsqueeze(-1) * x.unsqueeze(0), inputs=[floats(4, 4)]),
    "slice": Case(function=lambda x: x[:, 1:3] + x[:, -2:], inputs=[floats(B, S, 2)]),
    "cat": Case(function=lambda x, y: torch.cat([x, y, x], dim=1), inputs=[floats(B, 3), floats(B, 2)]),
    "cat of rows": Case(function=lambda x, y: torch.cat([x, y]), inputs=[floats(3, 2), floats(1, 2)]),
    "gather": Case(function=lambda x, i: x.gather(1, i), inputs=[floats(B, S), whole(B, 3)]),
    "index of rows": Case(function=lambda x, i: x[i], inputs=[floats(5, 8), whole(B, S)]),
    "arange": Case(function=lambda x: x + torch.arange(5), inputs=[whole(B, 5)]),
    "full_like": Case(
        function=lambda x: torch.full_like(x, -1) * x, inputs=[whole(B, S)], dynamic=BS, also=[whole(1, 4)]
    ),
    "arithmetic": Case(function=lambda x, y: (x + y) * (x - 2.5) - y * 3, inputs=[floats(B, S), floats(S)]),
    "numbers of sizes": Case(
        function=lambda x: x.clamp(0, x.shape[1] - 2),
        inputs=[whole(B, S, high=9)],
        dynamic=BS,
        also=[whole(B, 9, high=9)],
    ),
    "floor of a quotient": Case(
        function=lambda x: ((x - 5) // 3, x // x.shape[1]),
        inputs=[whole(B, S, high=11)],
        dynamic=BS,
        also=[whole(3, 4, high=11)],
    ),
    "remainder": Case(function=lambda x: torch.remainder(x - 5, 3), inputs=[whole(B, S, high=11)]),
    "product": Case(
        function=lambda x, w: x @ w,
        inputs=[floats(B, S, 8), floats(8, 3)],
        dynamic=[*BS, {}],
        also=[floats(1, 4, 8), floats(8, 3)],
    ),
    "sums of sizes": Case(
        function=lambda x, y: x.clamp(max=x.shape[1] + y.shape[0]),
        inputs=[whole(B, S, high=20), floats(3)],
        dynamic=[{1: "S"}, {0: "N"}],
        also=[whole(B, 4, high=20), floats(2)],
    ),
    "comparisons": Case(
        function=lambda x, y: (x <= y, x < y, x >= y, x > y, x == y), inputs=[whole(B, S), whole(1, S)]
    ),
    "comparisons with a number": Case(function=lambda x: (x <= 2, x < 2, x >= 2, x > 2, x == 2), inputs=[whole(B, S)]),
    "and, or": Case(function=lambda x, y: ((x > 1) & (y > 1), (x > 1) | (y > 1)), inputs=[whole(B, S), whole(1, S)]),
    "bitwise and, or": Case(
        function=lambda x, y: (torch.bitwise_and(x > 1, y > 1), torch.bitwise_or(x > 1, y > 1)),
        inputs=[whole(B, S), whole(1, S)],
    ),
    "where": Case(function=lambda x, y: torch.where(x > y, x, y), inputs=[floats(B, S), floats(1, S)]),
    "where with a number": Case(function=lambda x: torch.where(x > 0, x, -1), inputs=[whole(B, S)]),
    "clamp": Case(function=lambda x: x.clamp(min=0) + x.clamp(max=1) * x.clamp(-1, 1), inputs=[floats(B, S)]),
    "cast": Case(function=lambda x: (x.float() * 0.5).to(torch.int64), inputs=[whole(B, S)]),
    "gelu": Case(function=lambda x: F.gelu(x) + F.gelu(x, approximate="tanh") * 2, inputs=[floats(B, S)]),
    "layer norm": Case(
        function=lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5), inputs=[floats(B, S, 8), floats(8), floats(8)]
    ),
    "convolution": Case(
        function=lambda x, w, b: F.conv2d(x, w, b, stride=2),
        inputs=[floats(B, 3, 6, 6), floats(4, 3, 2, 2), floats(4)],
    ),
    "average": Case(function=lambda x: F.avg_pool2d(x, 2, 2), inputs=[floats(B, 3, 6, 6)]),
    "average of strips": Case(function=lambda x: F.avg_pool2d(x, (2, 3), (2, 3)), inputs=[floats(B, 3, 6, 6)]),
}


def targets(small: Small) -> set[object]:
    return {node.target for node in small.program.graph.nodes if node.op == "call_function"}


def made(case: Case) -> Small:
    return small_program(case.function, *case.inputs, dynamic=case.dynamic)


@pytest.mark.parametrize("name", CASES)
def test_onnx_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    small = made(case)
    graph = lower_and_open(tmp_path, small.program, Stored(plain=small.state))
    for inputs in [case.inputs, case.also] if case.also else [case.inputs]:
        given = dict(zip((spec.name for spec in small.program.stage.inputs), inputs, strict=True))
        result = case.function(*inputs)
        expected = result if isinstance(result, tuple) else (result,)
        for ours, theirs in zip(run(graph, given).values(), expected, strict=True):
            assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
            check("ort.rule", ours, theirs, name)


def test_every_rule_has_a_case() -> None:
    covered = {target for case in CASES.values() for target in targets(made(case))}
    tables = {**shape_rules.RULES, **math_rules.RULES}
    assert not [str(target) for target in tables if target not in covered]


def refused(function: Callable[..., object], *inputs: Tensor) -> str:
    with pytest.raises(ExportError) as caught:
        lower_for_ort(small_program(function, *inputs).program, OrtOptions())
    return caught.value.message


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        pytest.param(lambda x: x[:, ::2], [floats(2, 6)], "only slices with step 1", id="slice with a step"),
        pytest.param(lambda x: torch.add(x, x, alpha=2), [floats(3)], "'alpha', 2", id="alpha"),
        pytest.param(lambda x, i: x[i, i], [floats(3, 3), whole(2, high=3)], "only one index tensor", id="two indices"),
        pytest.param(
            lambda x, w, b: F.conv2d(x, w, b, stride=1, padding=1),
            [floats(1, 1, 4, 4), floats(1, 1, 3, 3), floats(1)],
            "cannot be lowered",
            id="padded convolution",
        ),
        pytest.param(
            lambda x: F.avg_pool2d(x, 2, 2, 1), [floats(1, 1, 4, 4)], "cannot be lowered", id="padded average"
        ),
        pytest.param(
            lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
            [floats(1, 2, 4, 8)],
            "implied causal mask",
            id="causal attention",
        ),
    ],
)
def test_what_a_rule_would_get_wrong_is_refused(
    function: Callable[..., object], inputs: Sequence[Tensor], reason: str
) -> None:
    message = refused(function, *inputs)
    assert reason in message and message.startswith("node `")


def test_an_unknown_op_is_named_with_its_node() -> None:
    message = refused(lambda x: torch.special.i0(x + 1), floats(3))
    assert message == "node `special_i0`: no rule lowers aten.special_i0.default to ONNX"


def test_a_rule_that_fails_is_named_with_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ctx: object, node: object) -> object:
        raise IndexError("tuple index out of range")

    monkeypatch.setitem(ORT_RULES, torch.ops.aten.tanh.default, broken)
    assert refused(torch.tanh, floats(3)) == (
        "node `tanh` (aten.tanh.default): its lowering failed: IndexError('tuple index out of range')"
    )


def test_a_duplicate_rule_raises() -> None:
    with pytest.raises(ExportError, match=r"two rules lower aten\.add\.Tensor: \S+math_rules and \S+shape_rules"):
        merge_tables(math_rules.RULES, {torch.ops.aten.add.Tensor: shape_rules.RULES[torch.ops.aten.view.default]})


def test_the_table_is_the_union_of_the_files() -> None:
    shared = (shape_rules.RULES, math_rules.RULES, attention_rules.RULES)
    assert len(ORT_RULES) == sum(len(table) for table in (*shared, ort_rules.RULES))
    assert len(TRT_RULES) == sum(len(table) for table in (*shared, trt_rules.RULES, trt_plugins.RULES))


def test_two_outputs_of_one_node_are_refused() -> None:
    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        return y, y

    assert "output `out.1` is not a value of its own: node `add`" in refused(twice, floats(3))


def test_a_weight_with_and_without_its_offset_is_refused() -> None:
    """They would be one name in the file."""
    from graphs.passes.fold_norm_offset import run as fold

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * (1.0 + self.weight) + self.weight

    small = small_program(Twice(), floats(4))
    fold(small.program)
    with pytest.raises(ExportError, match="two different tensors named `weight`"):
        lower_for_ort(small.program, OrtOptions())


@pytest.mark.parametrize(
    ("before", "after", "target"),
    [
        (("s0", "s1", 64), ("s0", "s1", 4, 16), [0, 0, 4, 16]),
        (("s0", "s1", 4, 16), ("s0", "s1", 64), [0, 0, 64]),
        (("s0", 48, 4, 4), ("s0", 48, 16), [0, 48, 16]),
        (("s0", 16), ("s0*2", 8), [-1, 8]),
        ((2, 3), (6,), [6]),
    ],
)
def test_reshape_targets(before: tuple[object, ...], after: tuple[object, ...], target: list[int]) -> None:
    assert reshape_target(before, after, "view") == target


def test_two_unknown_dimensions_cannot_be_reshaped() -> None:
    with pytest.raises(ExportError, match=r"node `view_3`: cannot reshape .* two dimensions are unknown"):
        reshape_target(("s0", "s1"), ("s1", "s0"), "view_3")
