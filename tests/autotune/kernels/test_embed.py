"""Embeddings from every kind of table, with and without image features."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from autotune.kernel import Case, Config
from autotune.kernels.embed import Embed, Table, embed, embed_oracle, multiplier
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, check_kernel

KERNEL = Embed()


def case(tokens: int, hidden: int, dtype: str, *, features: int = 0, zeros: int = 0, vocab: int = 97) -> Case:
    dims = {"tokens": tokens, "hidden": hidden, "vocab": vocab, "features": features, "zeros": zeros}
    return Case(dtype=dtype, dims=dims)


@pytest.mark.parametrize(
    ("dtype", "zeros"), [("bfloat16", 0), ("float32", 0), ("int8", 0), ("int8", 1), ("int4", 0), ("int4", 1)]
)
@pytest.mark.parametrize(("tokens", "hidden", "features"), [(1, 64, 0), (5, 96, 0), (7, 160, 4), (3, 2080, 1)])
def test_holds_to_its_oracle(tokens: int, hidden: int, features: int, dtype: str, zeros: int) -> None:
    check_kernel(KERNEL, case(tokens, hidden, dtype, features=features, zeros=zeros))


@pytest.mark.parametrize("block", [32, 512])
def test_every_number_of_columns_in_a_program(block: int) -> None:
    config = Config(constants={"BLOCK_H": block, "DEPENDENT": 1}, num_warps=4, num_stages=1)
    check_kernel(KERNEL, case(4, 224, "int4", features=2, zeros=1), config)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "zeros"), [("bfloat16", 0), ("int8", 0), ("int4", 1)])
@pytest.mark.parametrize(("tokens", "hidden", "features"), [(1, 2560, 0), (8192, 3840, 256), (16, 640, 0)])
def test_real_shapes(tokens: int, hidden: int, features: int, dtype: str, zeros: int) -> None:
    check_kernel(KERNEL, case(tokens, hidden, dtype, features=features, zeros=zeros, vocab=262_208))


@pytest.mark.parametrize("hidden", [640, 1152, 2560, 3840, 5376])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_multiplier_is_rounded_as_torch_rounds_it(hidden: int, dtype: torch.dtype) -> None:
    assert multiplier(hidden, dtype) == torch.tensor(hidden**0.5, dtype=dtype).item()


def test_equals_transformers_embedding() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    theirs = Gemma3TextScaledWordEmbedding(50, 96, 0, embed_scale=96**0.5).to(torch.bfloat16)
    ids, table = torch.tensor([3, 49, 7]), Table(values=theirs.weight.detach())
    with torch.no_grad():
        expected = theirs(ids)
    assert torch.equal(
        embed_oracle(ids, table, multiplier(96, torch.bfloat16), None, None, dtype=torch.bfloat16), expected
    )


def test_both_widths_of_ids_and_of_scales() -> None:
    inputs = KERNEL.inputs(case(6, 64, "int8", features=3), device=DEVICE)
    scales = inputs["scales"].bfloat16()
    table = Table(values=inputs["table"], scales=scales)
    rows = inputs["feature_rows"]
    narrow = embed(inputs["ids"], table, features_MH=inputs["features"], feature_rows_T=rows)
    wide = embed(inputs["ids"].long(), table, features_MH=inputs["features"], feature_rows_T=rows.long())
    assert torch.equal(narrow, wide)
    same = dataclasses.replace(table, scales=scales.float())
    assert torch.equal(narrow, embed(inputs["ids"], same, features_MH=inputs["features"], feature_rows_T=rows))


def test_an_id_beyond_the_table_reads_nothing() -> None:
    table = Table(values=torch.ones(4, 32, device=DEVICE))
    y = embed(torch.tensor([4, -1, 3], dtype=torch.int32, device=DEVICE), table, dtype=torch.float32)
    assert y.any(1).tolist() == [False, False, True]


def test_the_launcher_says_what_does_not_fit() -> None:
    ids = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    floats = Table(values=torch.zeros(9, 64, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(UsageError, match="only one of them came"):
        embed(ids, floats, feature_rows_T=ids)
    with pytest.raises(UsageError, match=r"table must be torch.float32, but is torch.bfloat16"):
        embed(ids, floats, dtype=torch.float32)
    codes = torch.zeros(9, 64, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(UsageError, match="codes of 4 or 8 bits in blocks of 32"):
        embed(ids, Table(values=codes, scales=torch.zeros(9, 1, device=DEVICE)))
    with pytest.raises(UsageError, match=r"zeros must have the shape \(9, 2\)"):
        embed(ids, Table(values=codes, scales=torch.zeros(9, 2, device=DEVICE), zeros=codes[:, :1].contiguous()))
