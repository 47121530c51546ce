"""Quantised rows on their way from a checkpoint into the weights file.

Legend: N rows, K columns, n blocks in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemma3_compile.checkpoints import BlockGrid, Checkpoint
from graphs.packing import pack_codes, pack_zeros
from graphs.weights import BlockFormat, Part
from runtimes.errors import ExportError


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """Rows in a block format: codes uint8 [N, K], scales fp32 [N, n], and what the format asks for besides.

    Codes count from 0, signed ones too; those of e4m3 are its bits.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    minimums: Tensor | None = None

    def rows(self, start: int, stop: int) -> Blocks:
        """Rows ``start`` to ``stop``."""
        return Blocks(
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            zeros=None if self.zeros is None else self.zeros[start:stop],
            minimums=None if self.minimums is None else self.minimums[start:stop],
        )

    def part(self, part: Part, form: BlockFormat) -> npt.NDArray[np.generic]:
        """One part as it is stored."""
        tensor = getattr(self, part, None)
        if tensor is None:
            raise ExportError(f"the format {form} needs `{part}`, but the quantised rows have none")
        if part == "codes":
            return pack_codes(tensor.numpy(), form)
        if part == "zeros":
            return pack_zeros(tensor.numpy(), form)
        if part == "scales" and form.whole_rows:
            tensor = tensor[:, 0]
        return as_stored(tensor.float(), form.scales if part == "scales" else "float32")


def as_stored(values: Tensor, dtype: str) -> npt.NDArray[np.generic]:
    """fp32 values in the width of the stored dtype; bfloat16 as its bits."""
    if dtype == "bfloat16":
        bits: npt.NDArray[np.generic] = values.to(torch.bfloat16).view(torch.int16).numpy()
        return bits
    plain: npt.NDArray[np.generic] = values.to(getattr(torch, dtype)).numpy()
    return plain


def keeps_grid(checkpoint: Checkpoint, name: str, form: BlockFormat) -> bool:
    """Whether ``form`` holds the grid that ``name`` is stored on exactly."""
    return form.scales == "float32" and keeps_codes(checkpoint, name, form)


def keeps_codes(checkpoint: Checkpoint, name: str, form: BlockFormat) -> bool:
    """Whether ``form`` holds the codes that ``name`` is stored in; its scales may be rounded."""
    grid = checkpoint.grid_info(name)
    if grid is None or grid.block_size != form.block_size or grid.bits > form.bits:
        return False
    return form.zero_points == ("none" if grid.integer_zero else "minimum")


def kept_blocks(checkpoint: Checkpoint, name: str, start: int, stop: int, form: BlockFormat) -> Blocks:
    """Rows on the checkpoint's own grid, moved to the zero point that ``form`` has: 2 ** (bits - 1)."""
    grid = checkpoint.read_grid_rows(name, start, stop)
    middle = 1 << (form.bits - 1)
    if grid.minimums is not None:
        return Blocks(codes=grid.codes, scales=grid.scales, minimums=grid.minimums - middle * grid.scales)
    return Blocks(codes=_recentre(grid, middle), scales=grid.scales)


def _recentre(grid: BlockGrid, middle: int) -> Tensor:
    zero = grid.zeros.flatten()[0]
    assert bool((grid.zeros == zero).all()), "one integer zero point for the whole tensor"
    return grid.codes + (middle - int(zero))
