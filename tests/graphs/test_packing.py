"""Packed codes and zero points against a reference that unpacks them one by one."""

from __future__ import annotations

import numpy as np
import pytest

from graphs.packing import pack_codes, pack_zeros
from graphs.weights import WHOLE_ROW, BlockFormat
from tests.graphs.unpacking import Bytes, unpacked


def form(bits: int, size: int = 32) -> BlockFormat:
    assert bits in (4, 8)
    return BlockFormat(bits=4 if bits == 4 else 8, block_size=size, zero_points="integer")


def codes(rows: int, columns: int, bits: int) -> Bytes:
    return np.random.default_rng(columns).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 96, 128, 40, 33, 1])
@pytest.mark.parametrize("size", [16, 32])
def test_codes_come_back(bits: int, columns: int, size: int) -> None:
    given, block = codes(5, columns, bits), form(bits, size)
    packed = pack_codes(given, block)
    assert packed.dtype == np.uint8 and packed.shape == (5, block.blocks(columns), size * bits // 8)
    assert np.array_equal(unpacked(packed, bits, columns), given)
    fill = unpacked(packed, bits, block.blocks(columns) * size)[:, columns:]
    assert (fill == 1 << (bits - 1)).all(), "a block is filled up with the middle code"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7])
def test_zero_points_come_back(bits: int, blocks: int) -> None:
    given = codes(6, blocks, bits)
    packed = pack_zeros(given, form(bits))
    assert packed.shape == (6, -(-blocks * bits // 8))
    assert np.array_equal(unpacked(packed, bits, blocks), given)


def test_an_example_by_hand() -> None:
    row = np.arange(16, dtype=np.uint8)[None]
    assert pack_codes(row, form(4, 16)).tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]]
    assert pack_zeros(np.array([[1, 2, 3]], dtype=np.uint8), form(4)).tolist() == [[0x21, 0x03]]


def test_what_is_given_is_left_as_it_is() -> None:
    given = codes(2, 40, 4)
    before = given.copy()
    pack_codes(given, form(4))
    assert np.array_equal(given, before)


def test_signed_codes_lie_in_twos_complement() -> None:
    """Each less the middle code; a block is filled up with zeros."""
    signed = BlockFormat(bits=4, block_size=16, zero_points="none", codes="signed")
    row = np.arange(15, dtype=np.uint8)[None]
    assert pack_codes(row, signed).tolist() == [[[0x98, 0xBA, 0xDC, 0xFE, 0x10, 0x32, 0x54, 0x06]]]
    given = codes(5, 96, 4)
    assert np.array_equal(unpacked(pack_codes(given, signed), 4, 96), (given - 8) & 15)


def test_codes_with_one_scale_a_row_are_bytes() -> None:
    row = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    whole = BlockFormat(bits=8, block_size=WHOLE_ROW, zero_points="none", codes="signed")
    assert pack_codes(row, whole).view(np.int8).tolist() == [[-128, -1, 0, 127]]
    bits = BlockFormat(bits=8, block_size=WHOLE_ROW, zero_points="none", codes="e4m3")
    assert np.array_equal(pack_codes(row, bits), row)
