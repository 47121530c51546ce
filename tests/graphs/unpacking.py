"""Reads quantised weights back out of a weights file, element by element, as the format's docstring says.

Legend: N rows, K columns, n blocks in a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from graphs.weights import Weight

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def unpacked(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first ``count`` codes of each row: element i in byte i // 2, even ones in the low half."""
    rows = packed.reshape(packed.shape[0], -1)
    if bits == 8:
        return rows[:, :count]
    return np.array([[(row[i // 2] >> (4 * (i % 2))) & 15 for i in range(count)] for row in rows], dtype=np.uint8)


def stored_values(tensors: Mapping[str, npt.NDArray[np.generic]], weight: Weight) -> Floats:
    """The fp32 weight [N, K] that the entries of ``weight`` in a file mean."""
    form = weight.format
    if form is None:
        return tensors[weight.name].astype(np.float32)
    columns = weight.shape[1]
    if form.whole_rows:
        rows = tensors[f"{weight.name}.codes"].astype(np.float32).T
        return rows * tensors[f"{weight.name}.scales"].astype(np.float32)[:, None]
    blocks = form.blocks(columns)

    def wide(per_block: npt.NDArray[np.generic]) -> Floats:
        return np.repeat(per_block.astype(np.float32), form.block_size, axis=1)[:, :columns]

    codes = unpacked(tensors[f"{weight.name}.codes"], form.bits, columns).astype(np.float32)
    if form.codes == "signed":  # two's complement
        codes = np.where(codes < 1 << (form.bits - 1), codes, codes - (1 << form.bits)) + (1 << (form.bits - 1))
    scales = wide(tensors[f"{weight.name}.scales"])
    if form.zero_points == "integer":
        return (codes - wide(unpacked(tensors[f"{weight.name}.zeros"], form.bits, blocks))) * scales
    values = (codes - np.float32(1 << (form.bits - 1))) * scales
    return values - wide(tensors[f"{weight.name}.minimums"]) if form.zero_points == "minimum" else values
