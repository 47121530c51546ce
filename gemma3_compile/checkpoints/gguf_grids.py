"""The ggml formats whose grid is kept: codes, scales and zero points out of the packed bytes.

Legend: R rows, K columns, S super-blocks in a row (K / 256 or K / 32), b block size.

Formats (ggml's ``ggml-common.h``; fp16 numbers, little-endian):
    q8_0  32 columns: d, 32 signed bytes                           w = d * q
    q4_0  32 columns: d, 16 bytes of two codes                     w = d * (q - 8)
    q5_0  32 columns: d, 4 bytes of fifth bits, 16 bytes           w = d * (q - 16)
    q6_K  256 columns: 128 bytes low, 64 bytes high, 16 signed sub-scales sc, d      w = d * sc * (q - 32)
    q4_K  256 columns: d, dmin, 12 bytes of 8 six-bit pairs (sc, m), 128 bytes       w = d * sc * q - dmin * m
A product of an fp16 and a sub-scale fits fp32 exactly, so every scale and minimum here is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Ggml

from gemma3_compile.checkpoints.base import BlockGrid, GridInfo

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_LOW_HIGH = np.array([0, 4], dtype=np.uint8)
"""Shifts to the two codes of one byte."""


def _floats(raw: Bytes) -> Floats:
    """fp16 little-endian bytes [..., 2] to fp32 [...]."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)


def _split(raw: Bytes, *sizes: int) -> list[Bytes]:
    """Bytes [R, S * sum(sizes)] to one array [R, S, size] for each size."""
    blocks = raw.reshape(raw.shape[0], -1, sum(sizes))
    edges = np.cumsum(sizes)[:-1].tolist()
    return np.split(blocks, edges, axis=2)


def _nibbles(packed: Bytes, half: int) -> Bytes:
    """Bytes [R, S, n] to codes [R, S, 2 n]: in runs of ``half`` bytes, all low halves before the high ones."""
    rows, blocks, _ = packed.shape
    runs = packed.reshape(rows, blocks, -1, 1, half) >> _LOW_HIGH[:, None]
    return (runs & np.uint8(15)).reshape(rows, blocks, -1)


Parts = tuple[Bytes, Floats, Floats | float, Floats | None]
"""codes [R, K], scales [R, K / b], zeros (the same shape, or one number), minimums."""


def _unpack_q8_0(raw: Bytes) -> Parts:
    d, q = _split(raw, 2, 32)
    return (q ^ np.uint8(128)).reshape(raw.shape[0], -1), _floats(d), 128.0, None


def _unpack_q4_0(raw: Bytes) -> Parts:
    d, q = _split(raw, 2, 16)
    return _nibbles(q, 16).reshape(raw.shape[0], -1), _floats(d), 8.0, None


def _unpack_q5_0(raw: Bytes) -> Parts:
    d, high, low = _split(raw, 2, 4, 16)
    fifth = np.unpackbits(np.ascontiguousarray(high), axis=2, bitorder="little")
    codes = _nibbles(low, 16) | (fifth << np.uint8(4))
    return codes.reshape(raw.shape[0], -1), _floats(d), 16.0, None


def _unpack_q6_k(raw: Bytes) -> Parts:
    low, high, sub, d = _split(raw, 128, 64, 16, 2)
    rows, blocks, _ = low.shape
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    top = ((high.reshape(rows, blocks, 2, 1, 32) >> shifts) & np.uint8(3)).reshape(rows, blocks, 256)
    codes = _nibbles(low, 64) | (top << np.uint8(4))
    scales = _floats(d)[..., None] * np.ascontiguousarray(sub).view(np.int8).astype(np.float32)
    return codes.reshape(rows, -1), scales.reshape(rows, -1), 32.0, None


def _unpack_q4_k(raw: Bytes) -> Parts:
    d, d_min, packed, q = _split(raw, 2, 2, 12, 128)
    rows = raw.shape[0]
    first, second, mixed = np.split(packed, 3, axis=2)
    sub = np.concatenate([first & 63, (mixed & 15) | ((first >> 2) & 48)], axis=2)
    sub_min = np.concatenate([second & 63, (mixed >> 4) | ((second >> 2) & 48)], axis=2)
    scales = (_floats(d)[..., None] * sub.astype(np.float32)).reshape(rows, -1)
    minimums = (_floats(d_min)[..., None] * sub_min.astype(np.float32)).reshape(rows, -1)
    codes = _nibbles(q, 32).reshape(rows, -1)
    # A block of scale 0 is the constant -minimum: codes 0, zero 1 and the minimum as scale say the same.
    flat = scales == 0
    codes.reshape(rows, -1, 32)[flat] = 0
    scales = np.where(flat, minimums, scales)
    zeros = np.divide(minimums, scales, out=np.zeros_like(scales), where=scales != 0)
    return codes, scales, zeros, minimums


@dataclass(frozen=True, kw_only=True)
class GridKind:
    """How one ggml format is unpacked."""

    info: GridInfo
    unpack: Callable[[Bytes], Parts]


def _kind(name: str, bits: int, block_size: int, unpack: Callable[[Bytes], Parts], integer_zero: bool) -> GridKind:
    info = GridInfo(bits=bits, block_size=block_size, kind=name, integer_zero=integer_zero)
    return GridKind(info=info, unpack=unpack)


GRID_KINDS: Mapping[Ggml, GridKind] = {
    Ggml.Q8_0: _kind("q8_0", 8, 32, _unpack_q8_0, True),
    Ggml.Q4_0: _kind("q4_0", 4, 32, _unpack_q4_0, True),
    Ggml.Q5_0: _kind("q5_0", 8, 32, _unpack_q5_0, True),
    Ggml.Q6_K: _kind("q6_K", 8, 16, _unpack_q6_k, True),
    Ggml.Q4_K: _kind("q4_K", 4, 32, _unpack_q4_k, False),
}
"""The formats whose grid is kept. Every other one is dequantised."""


def unpack_grid(raw: npt.NDArray[Any], kind: GridKind) -> BlockGrid:
    """Packed rows to a grid.

    Args:
        raw: uint8 [R, bytes in a row], as the file holds them.
        kind: an entry of ``GRID_KINDS``.
    """
    codes, scales, zeros, minimums = kind.unpack(raw)
    scales_t = torch.from_numpy(np.ascontiguousarray(scales))
    return BlockGrid(
        codes=torch.from_numpy(np.ascontiguousarray(codes)),
        scales=scales_t,
        zeros=torch.full_like(scales_t, zeros) if isinstance(zeros, float) else torch.from_numpy(zeros),
        minimums=None if minimums is None else torch.from_numpy(minimums),
        bits=kind.info.bits,
        block_size=kind.info.block_size,
    )
