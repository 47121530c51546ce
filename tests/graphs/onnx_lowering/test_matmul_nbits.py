"""Quantised linears and embeddings in ONNX Runtime against the fp32 weight that their format means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3_compile.blocks import Blocks
from graphs.onnx_lowering.context import Activations, OrtOptions
from graphs.onnx_lowering.lower import lower_for_ort
from graphs.weights import BlockFormat, ZeroPoints
from runtimes.errors import ExportError
from tests.graphs.ort import Stored, dequantized, lower_and_open, random_blocks, run
from tests.graphs.small import Small, small_program
from tests.tolerances import TOLERANCES, check, relative_error

ROWS = 24
FORMATS: dict[str, tuple[int, BlockFormat]] = {
    "int8, blocks of 32": (128, BlockFormat(bits=8, block_size=32, zero_points="none")),
    "int8, blocks of 16 as q6_K has": (128, BlockFormat(bits=8, block_size=16, zero_points="none")),
    "int8, a block not full": (48, BlockFormat(bits=8, block_size=32, zero_points="none")),
    "int8 with minimums as q5_K would have": (128, BlockFormat(bits=8, block_size=32, zero_points="minimum")),
    "int4 as q4_0 has": (128, BlockFormat(bits=4, block_size=32, zero_points="none")),
    "int4 with zero points": (128, BlockFormat(bits=4, block_size=32, zero_points="integer")),
    "int4, three blocks: half a byte over": (96, BlockFormat(bits=4, block_size=32, zero_points="integer")),
    "int4, a block not full": (80, BlockFormat(bits=4, block_size=32, zero_points="integer")),
    "int4, not full, without zero points": (80, BlockFormat(bits=4, block_size=32, zero_points="none")),
    "int4 with minimums as q4_K has": (128, BlockFormat(bits=4, block_size=32, zero_points="minimum")),
    "int4 with minimums, three blocks": (96, BlockFormat(bits=4, block_size=32, zero_points="minimum")),
    "int8 with zero points": (96, BlockFormat(bits=8, block_size=32, zero_points="integer")),
}
ACTIVATIONS: tuple[Activations, ...] = ("int8", "int16")


def linear(columns: int, form: BlockFormat, *, bias: bool = False) -> tuple[Small, Blocks]:
    """A linear over [B, S, K] whose weight is stored in ``form``."""
    module = nn.Linear(columns, ROWS, bias=bias)
    small = small_program(module, inputs(columns), dynamic=[{0: "B", 1: "S"}], formats={"weight": form})
    return small, random_blocks(ROWS, columns, form, seed=columns)


def inputs(columns: int, batch: int = 2, tokens: int = 7) -> Tensor:
    """Activations with outliers, as a decoder has them."""
    x = torch.randn((batch, tokens, columns), generator=torch.Generator().manual_seed(tokens))
    x[..., 5] *= 20
    return x


def rounded(x: Tensor, block_size: int) -> Tensor:
    """``x`` on int8 steps, one step a block: its peak over 127."""
    columns = x.shape[-1]
    fill = -columns % block_size
    blocks = F.pad(x, (0, fill)).unflatten(-1, (-1, block_size))
    step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / step).round() * step).flatten(-2)[..., :columns]


def product(x: Tensor, blocks: Blocks, form: BlockFormat, activations: Activations) -> Tensor:
    """What a quantised linear means, in float64. The minimums multiply activations as they are."""
    seen = rounded(x, form.block_size)
    if activations == "int16":
        seen = seen + rounded(x - seen, form.block_size)
    weight = dequantized(blocks, form).double()
    if blocks.minimums is None:
        return seen.double() @ weight.T
    minimums = blocks.minimums.double().repeat_interleave(form.block_size, dim=1)
    return seen.double() @ (weight + minimums).T - x.double() @ minimums.T


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_computes_its_dequantised_product(name: str, activations: Activations, tmp_path: Path) -> None:
    columns, form = FORMATS[name]
    small, blocks = linear(columns, form)
    stored = Stored(plain=small.state, blocks={"weight": blocks})
    graph = lower_and_open(tmp_path, small.program, stored, OrtOptions(activations=activations))
    for batch, tokens in ((2, 7), (1, 1), (3, 40)):
        x = inputs(columns, batch, tokens)
        ours, expected = run(graph, {"in.0": x})["out.0"], product(x, blocks, form, activations)
        check("ort.quantised_product", ours, expected, f"{name}, {batch} x {tokens}")


@pytest.mark.parametrize("name", FORMATS)
def test_two_passes_keep_what_one_loses(name: str, tmp_path: Path) -> None:
    """``int16`` activations are a hundred times as near; without that they would not be worth a second pass."""
    columns, form = FORMATS[name]
    small, blocks = linear(columns, form)
    stored, x = Stored(plain=small.state, blocks={"weight": blocks}), inputs(columns)
    expected = x.double() @ dequantized(blocks, form).double().T
    errors: dict[str, float] = {}
    for activations in ACTIVATIONS:
        graph = lower_and_open(tmp_path, small.program, stored, OrtOptions(activations=activations))
        ours = run(graph, {"in.0": x})["out.0"]
        errors[activations] = relative_error(ours, expected)
        check(f"ort.{activations}_activations", ours, expected, name)
    assert errors["int16"] < errors["int8"] / 100, errors


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_bias_is_added(activations: Activations, tmp_path: Path) -> None:
    columns, form = FORMATS["int8, blocks of 32"]
    small, blocks = linear(columns, form, bias=True)
    bias = torch.arange(float(ROWS))
    stored = Stored(plain={"bias": bias}, blocks={"weight": blocks})
    graph = lower_and_open(tmp_path, small.program, stored, OrtOptions(activations=activations))
    x = inputs(columns)
    expected = product(x, blocks, form, activations) + bias
    check("ort.quantised_product", run(graph, {"in.0": x})["out.0"], expected)


@pytest.mark.parametrize("fault", ["scales", "zeros", "codes"])
def test_the_comparison_can_fail(fault: str, tmp_path: Path) -> None:
    """A scale, a zero point or a code of one block of one row is another: far off, if int8 activations can tell."""
    columns, form = FORMATS["int4 with zero points"]
    small, blocks = linear(columns, form)
    x = inputs(columns)
    expected = product(x, blocks, form, "int8")
    part = getattr(blocks, fault)
    part[3, 1] = part[3, 1] + 1 if fault == "scales" else (part[3, 1] + 8) % 16
    graph = lower_and_open(tmp_path, small.program, Stored(plain={}, blocks={"weight": blocks}))
    error = relative_error(run(graph, {"in.0": x})["out.0"], expected)
    assert error > 100 * TOLERANCES["ort.quantised_product"].relative


def test_minimums_need_full_blocks() -> None:
    small, _ = linear(48, BlockFormat(bits=4, block_size=32, zero_points="minimum"))
    with pytest.raises(ExportError, match="`weight`: 48 columns do not fill blocks of 32"):
        lower_for_ort(small.program, OrtOptions())


def test_a_zero_input_gives_zeros(tmp_path: Path) -> None:
    """No block of it has a peak to divide by."""
    columns, form = FORMATS["int8, blocks of 32"]
    small, blocks = linear(columns, form)
    stored = Stored(plain=small.state, blocks={"weight": blocks})
    graph = lower_and_open(tmp_path, small.program, stored, OrtOptions(activations="int16"))
    assert not run(graph, {"in.0": torch.zeros(1, 2, columns)})["out.0"].any()


def table(form: BlockFormat, columns: int = 128) -> tuple[Small, Blocks]:
    """A tied embedding: a lookup and a head over one weight."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(ROWS, columns))

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            rows = F.embedding(ids, self.weight)
            return rows * 2.0, F.linear(rows, self.weight)

    ids = torch.tensor([[0, 23, 7], [1, 1, 2]])
    small = small_program(Tied(), ids, dynamic=[{0: "B", 1: "S"}], formats={"weight": form})
    return small, random_blocks(ROWS, columns, form, seed=7)


TABLES = [name for name, (columns, form) in FORMATS.items() if form.zero_points != "minimum" and columns == 128]


@pytest.mark.parametrize("name", TABLES)
def test_a_tied_embedding_is_stored_once(name: str, tmp_path: Path) -> None:
    """Lookup and head read the same bytes; the lookup is exact."""
    form = FORMATS[name][1]
    small, blocks = table(form)
    lowered = lower_for_ort(small.program, OrtOptions(activations="int16"))
    assert {entry.name for entry in lowered.stored} == {f"weight.{part}" for part in form.parts}
    views = [use for use in lowered.weight_uses if use.entry.part == "codes"]
    assert sorted(len(use.shape) for use in views) == [2, 3] and len({use.entry for use in views}) == 1
    graph = lower_and_open(
        tmp_path, small.program, Stored(plain={}, blocks={"weight": blocks}), OrtOptions(activations="int16")
    )
    ids = torch.tensor([[3, 0, 23, 11]])
    weight = dequantized(blocks, form)
    ours = run(graph, {"in.0": ids})
    assert np.array_equal(ours["out.0"], (weight[ids] * 2).numpy())
    check("ort.quantised_product", ours["out.1"], product(weight[ids], blocks, form, "int16"))


@pytest.mark.parametrize(
    ("zero_points", "columns"), [("minimum", 128), ("none", 80)], ids=["minimums", "a block not full"]
)
def test_a_table_that_cannot_be_looked_up_is_refused(zero_points: ZeroPoints, columns: int) -> None:
    small, _ = table(BlockFormat(bits=4, block_size=32, zero_points=zero_points), columns)
    with pytest.raises(ExportError, match=r"`weight`: an embedding in .* cannot be looked up by ONNX Runtime"):
        lower_for_ort(small.program, OrtOptions())


def test_a_quantised_weight_read_as_a_tensor_is_refused() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    form = BlockFormat(bits=8, block_size=32, zero_points="none")
    small = small_program(Product(), torch.zeros(2, 32), formats={"weight": form})
    with pytest.raises(ExportError, match="`weight` is quantised"):
        lower_for_ort(small.program, OrtOptions())
