"""numpy has no bfloat16: its bits as uint16, from float32 and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bits_of(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 rounded to bfloat16, to the nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    wide = values.view(np.uint32)
    rounded = (wide + (0x7FFF + ((wide >> 16) & 1))) >> 16
    rounded = np.where(np.isnan(values), 0x7FC0, rounded)
    return rounded.astype(np.uint16)


def floats_of(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 of the same values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
