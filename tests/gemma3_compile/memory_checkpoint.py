"""A checkpoint in memory: plain tensors, and grids of every kind, for tests of what is made from one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from gemma3_compile.checkpoints import BlockGrid, Checkpoint, GridInfo, TensorInfo
from gemma3_compile.config import ModelConfig
from gemma3_compile.presets import preset

KINDS: Mapping[str, GridInfo] = {
    "q4_0": GridInfo(bits=4, block_size=32, kind="q4_0", integer_zero=True),
    "q4_K": GridInfo(bits=4, block_size=32, kind="q4_K", integer_zero=False),
    "q5_0": GridInfo(bits=8, block_size=32, kind="q5_0", integer_zero=True),
    "q6_K": GridInfo(bits=8, block_size=16, kind="q6_K", integer_zero=True),
    "q8_0": GridInfo(bits=8, block_size=32, kind="q8_0", integer_zero=True),
}
_ZEROS = {"q4_0": 8, "q5_0": 16, "q6_K": 32, "q8_0": 128}
_CODES = {"q4_0": 16, "q4_K": 16, "q5_0": 32, "q6_K": 64, "q8_0": 256}


def random_grid(kind: str, rows: int, columns: int, seed: int = 0) -> BlockGrid:
    """Rows on the grid of ggml's format ``kind``, scales fp16 as there, codes over the whole range."""
    generator, info = torch.Generator().manual_seed(seed), KINDS[kind]
    shape = (rows, columns // info.block_size)
    codes = torch.randint(_CODES[kind], (rows, columns), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=generator) * 0.02 + 0.001).half().float()
    if info.integer_zero:
        zeros = torch.full(shape, float(_ZEROS[kind]))
        return BlockGrid(
            codes=codes, scales=scales, zeros=zeros, minimums=None, bits=info.bits, block_size=info.block_size
        )
    minimums = (torch.rand(shape, generator=generator) * 0.1).half().float()
    return BlockGrid(
        codes=codes,
        scales=scales,
        zeros=minimums / scales,
        minimums=minimums,
        bits=info.bits,
        block_size=info.block_size,
    )


class MemoryCheckpoint(Checkpoint):
    """``tensors`` by canonical name; ``grids`` maps some names to a kind and a grid. Counts what is read."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        grids: Mapping[str, tuple[str, BlockGrid]] | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        self.config = config or preset("nano")
        self.source = "memory"
        self.grids = dict(grids or {})
        self.tensors = {**tensors, **{name: grid.dequantize() for name, (_, grid) in self.grids.items()}}
        self.rows_read: Counter[str] = Counter()

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def info(self, name: str) -> TensorInfo:
        dtype = self.grids[name][0] if name in self.grids else str(self.tensors[name].dtype).removeprefix("torch.")
        return TensorInfo(shape=tuple(self.tensors[name].shape), dtype=dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        self.rows_read[name] += stop - start
        return self.tensors[name][start:stop].clone()

    def grid_info(self, name: str) -> GridInfo | None:
        return KINDS[self.grids[name][0]] if name in self.grids else None

    def read_grid_rows(self, name: str, start: int, stop: int) -> BlockGrid:
        self.rows_read[name] += stop - start
        grid = self.grids[name][1]
        return BlockGrid(
            codes=grid.codes[start:stop],
            scales=grid.scales[start:stop],
            zeros=grid.zeros[start:stop],
            minimums=None if grid.minimums is None else grid.minimums[start:stop],
            bits=grid.bits,
            block_size=grid.block_size,
        )
