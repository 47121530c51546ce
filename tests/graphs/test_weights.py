"""Recipes of weights, the entries they need, and the plan of a weights file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from graphs.weights import WHOLE_ROW, BlockFormat, Weight, WeightsPlan
from runtimes.errors import ExportError

INT8 = BlockFormat(bits=8, block_size=32, zero_points="none")
INT4 = BlockFormat(bits=4, block_size=32, zero_points="integer")
KEPT = BlockFormat(bits=4, block_size=32, zero_points="minimum")


def weight(name: str, *shape: int, form: BlockFormat | None = None, dtype: str = "float32") -> Weight:
    return Weight(sources=(name,), shape=shape, dtype=dtype, format=form)


def shapes(one: Weight) -> dict[str, tuple[str, tuple[int, ...], int]]:
    return {entry.name: (entry.dtype, entry.shape, entry.size_bytes) for entry in one.stored()}


def test_a_plain_weight_is_one_entry() -> None:
    assert shapes(weight("decoder.norm.weight", 64)) == {"decoder.norm.weight": ("float32", (64,), 256)}
    assert shapes(weight("a.weight", 3, 5, dtype="bfloat16")) == {"a.weight": ("bfloat16", (3, 5), 30)}


def test_a_quantised_weight_is_codes_scales_and_what_the_format_asks_for() -> None:
    assert shapes(weight("a.weight", 10, 96, form=INT8)) == {
        "a.weight.codes": ("uint8", (10, 3, 32), 960),
        "a.weight.scales": ("float32", (10, 3), 120),
    }
    assert shapes(weight("a.weight", 10, 96, form=INT4)) == {
        "a.weight.codes": ("uint8", (10, 3, 16), 480),
        "a.weight.scales": ("float32", (10, 3), 120),
        "a.weight.zeros": ("uint8", (10, 2), 20),  # three half bytes take two bytes
    }
    assert shapes(weight("a.weight", 10, 64, form=KEPT)) == {
        "a.weight.codes": ("uint8", (10, 2, 16), 320),
        "a.weight.scales": ("float32", (10, 2), 80),
        "a.weight.minimums": ("float32", (10, 2), 80),
    }


def test_a_last_block_that_is_not_full_takes_its_room() -> None:
    assert shapes(weight("a.weight", 4, 80, form=INT8))["a.weight.codes"] == ("uint8", (4, 3, 32), 384)


@pytest.mark.parametrize("size", [8, 24, 0, 33])
def test_block_sizes(size: int) -> None:
    with pytest.raises(ExportError, match=f"must be a power of two of at least 16, but got {size}"):
        BlockFormat(bits=4, block_size=size, zero_points="none")


SIGNED = BlockFormat(bits=4, block_size=32, zero_points="none", codes="signed", scales="bfloat16")
ROWS = BlockFormat(bits=8, block_size=WHOLE_ROW, zero_points="none", codes="signed", scales="bfloat16")
FLOATS = BlockFormat(bits=8, block_size=WHOLE_ROW, zero_points="none", codes="e4m3", scales="bfloat16")


def test_tensorrts_formats() -> None:
    """Codes with one scale a row lie transposed."""
    assert shapes(weight("a.weight", 10, 96, form=SIGNED)) == {
        "a.weight.codes": ("uint8", (10, 3, 16), 480),
        "a.weight.scales": ("bfloat16", (10, 3), 60),
    }
    for form, dtype in ((ROWS, "int8"), (FLOATS, "float8_e4m3fn")):
        one = weight("a.weight", 10, 33, form=form)
        assert shapes(one) == {
            "a.weight.codes": (dtype, (33, 10), 330),
            "a.weight.scales": ("bfloat16", (10,), 20),
        }
        assert [entry.transposed for entry in one.stored()] == [True, False]
        assert form.blocks(33) == 1
    assert not any(entry.transposed for entry in weight("a.weight", 10, 96, form=SIGNED).stored())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"bits": 4, "codes": "signed", "zero_points": "integer", "block_size": 32},
            "signed codes have no zero points",
        ),
        ({"bits": 8, "codes": "e4m3", "zero_points": "none", "block_size": 32}, "eight bits and one scale a row"),
        ({"bits": 4, "codes": "e4m3", "zero_points": "none", "block_size": 0}, "eight bits and one scale a row"),
        ({"bits": 4, "codes": "signed", "zero_points": "none", "block_size": 0}, "a power of two"),
        ({"bits": 8, "codes": "unsigned", "zero_points": "none", "block_size": 0}, "a power of two"),
    ],
)
def test_formats_that_do_not_go_together(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        BlockFormat(**wrong)


def test_names_of_stacked_weights() -> None:
    sources = tuple(f"decoder.layers.3.self_attn.{leaf}_proj.weight" for leaf in "qkv")
    stacked = Weight(sources=sources, shape=(128, 64), dtype="float32")
    assert stacked.name == "decoder.layers.3.self_attn.q_proj+k_proj+v_proj.weight"
    assert [entry.name for entry in replace(stacked, format=INT8).stored()] == [
        "decoder.layers.3.self_attn.q_proj+k_proj+v_proj.weight.codes",
        "decoder.layers.3.self_attn.q_proj+k_proj+v_proj.weight.scales",
    ]


def test_equal_wishes_are_stored_once() -> None:
    one, two = weight("a.weight", 16), weight("b.weight", 16)
    plan = WeightsPlan.merge([[*one.stored(), *two.stored()], one.stored(), two.stored()])
    assert [entry.name for entry in plan.entries] == ["a.weight", "b.weight"]
    assert plan.size_bytes == 128 and plan.weights == (one, two)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(weight("a.weight", 32), id="shape"),
        pytest.param(weight("a.weight", 16, dtype="bfloat16"), id="dtype"),
        pytest.param(replace(weight("a.weight", 16), offset=1.0), id="offset"),
    ],
)
def test_different_wishes_under_one_name_raise(other: Weight) -> None:
    with pytest.raises(ExportError, match=r"two graphs want different tensors named `a\.weight`"):
        WeightsPlan.merge([weight("a.weight", 16).stored(), other.stored()])


def test_different_formats_under_one_name_raise() -> None:
    with pytest.raises(ExportError, match=r"two graphs want different tensors named `a\.weight\.codes`"):
        WeightsPlan.merge([weight("a.weight", 64, 64, form=f).stored() for f in (INT4, KEPT)])


def test_the_order_is_by_layer_number() -> None:
    names = ["decoder.layers.10.x.weight", "decoder.layers.2.x.weight", "decoder.norm.weight", "decoder.embed.weight"]
    plan = WeightsPlan.merge([weight(name, 16).stored() for name in names])
    assert [entry.name for entry in plan.entries] == [names[3], names[1], names[0], names[2]]


def test_the_order_does_not_depend_on_the_graphs() -> None:
    groups = [weight(name, size).stored() for name, size in (("c.w", 16), ("a.w", 3), ("b.w", 5), ("d.w", 16))]
    assert WeightsPlan.merge(groups).entries == WeightsPlan.merge(reversed(groups)).entries


def test_every_item_stays_aligned() -> None:
    """Entries of whole 64 bytes first; the odd ones after them by item size, the widest first."""
    odd = [
        weight("a.weight", 3, 80, form=INT4),
        weight("b.weight", 3, dtype="bfloat16"),
        weight("c.weight", 5),
        weight("d.weight", 64, 64, form=INT4),
        weight("e.weight", 7, 32, form=BlockFormat(bits=8, block_size=32, zero_points="integer")),
    ]
    plan = WeightsPlan.merge(one.stored() for one in odd)
    position, sizes = 0, []
    for entry in plan.entries:
        width = {"float32": 4, "bfloat16": 2, "uint8": 1}[entry.dtype]
        assert position % width == 0, f"{entry.name} at {position}"
        if entry.size_bytes % 64 == 0:
            assert position % 64 == 0, f"{entry.name} at {position}"
        sizes.append(entry.size_bytes % 64)
        position += entry.size_bytes
    assert sizes == sorted(sizes, key=bool) and any(sizes)


def test_the_parts_of_a_weight_are_its_entries() -> None:
    one = weight("a.weight", 64, 128, form=INT4)
    plan = WeightsPlan.merge([one.stored()])
    assert {entry.part for entry in plan.entries} == set(INT4.parts) == {"codes", "scales", "zeros"}
    assert plan.weights == (one,)
