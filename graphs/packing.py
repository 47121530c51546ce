"""How quantised codes lie in bytes: blocks along a row, low bits first, as MatMulNBits reads them.

Legend: N rows, K columns, b block size, n = ceil(K / b) blocks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from graphs.weights import BlockFormat

Bytes = npt.NDArray[np.uint8]


def pack_codes(codes_NK: Bytes, form: BlockFormat) -> Bytes:
    """Codes, one a byte, to [N, n, b * bits / 8]. The last block is filled up with the middle code.

    Signed ones lie in two's complement, each less the middle code. With one scale a row they are bytes, [N, K].
    """
    if form.whole_rows:
        return codes_NK if form.codes == "e4m3" else codes_NK - np.uint8(1 << (form.bits - 1))
    rows, columns = codes_NK.shape
    blocks, middle = form.blocks(columns), 1 << (form.bits - 1)
    if blocks * form.block_size != columns:
        fill = blocks * form.block_size - columns
        codes_NK = np.pad(codes_NK, ((0, 0), (0, fill)), constant_values=middle)
    if form.codes == "signed":
        codes_NK = (codes_NK - np.uint8(middle)) & np.uint8((1 << form.bits) - 1)
    return _pack(codes_NK, form.bits).reshape(rows, blocks, form.block_size * form.bits // 8)


def pack_zeros(zeros_Nn: Bytes, form: BlockFormat) -> Bytes:
    """Integer zero points, one a byte, to [N, ceil(n * bits / 8)]."""
    if form.bits == 4 and zeros_Nn.shape[1] % 2:
        zeros_Nn = np.pad(zeros_Nn, ((0, 0), (0, 1)))
    return _pack(zeros_Nn, form.bits)


def _pack(values: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return values
    pairs: Bytes = values[:, 0::2] | (values[:, 1::2] << np.uint8(4))
    return pairs
