"""Follows the recipes of a WeightsPlan: reads a checkpoint row by row and writes the bundle's weights file.

At most a few million weights are in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from gemma3_compile.blocks import Blocks, keeps_grid, kept_blocks
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.quantize.rounding import quantize_rtn
from graphs.weights import BlockFormat, Part, StoredTensor, Weight, WeightsPlan
from graphs.weights_file import WeightsFile
from runtimes.progress import SILENT, Advance, Progress

CHUNK_ELEMENTS = 1 << 23
"""Weights that are in memory at a time, in fp32 and as codes."""


@dataclass(kw_only=True)
class WeightsWriter:
    """Writes every weight of ``plan``; ``calibrated`` holds rows that were quantised beforehand."""

    plan: WeightsPlan
    checkpoint: Checkpoint
    file: WeightsFile
    calibrated: Mapping[str, Blocks] = field(default_factory=dict)

    def write(self, progress: Progress = SILENT) -> None:
        """Writes everything, with a bar over the bytes."""
        entries: dict[Weight, list[StoredTensor]] = {}
        for entry in self.plan.entries:
            entries.setdefault(entry.weight, []).append(entry)
        with progress.task("writing weights", total=self.plan.size_bytes, unit="bytes") as advance:
            for weight in self.plan.weights:
                row = 0
                for source in weight.sources:
                    row += self._write_source(source, weight, row, entries[weight], advance)

    def _write_source(
        self, source: str, weight: Weight, row: int, entries: list[StoredTensor], advance: Advance
    ) -> int:
        """Writes one source from row ``row`` of the stacked weight on; returns how many rows it has."""
        shape = self.checkpoint.info(source).shape
        for start, stop in _chunks(shape):
            parts = self._parts(source, weight, start, stop)
            for entry in entries:
                advance(self.file.write_rows(entry, row + start, parts[entry.part]))
        return shape[0]

    def _parts(self, source: str, weight: Weight, start: int, stop: int) -> dict[Part, npt.NDArray[np.generic]]:
        """Rows of one source in every part that the weight is stored in; they are read and rounded once."""
        form = weight.format
        if form is None:
            values = self.checkpoint.read_rows(source, start, stop).float() + weight.offset
            return {"values": as_stored(values, weight.dtype)}
        blocks = self._blocks(source, form, start, stop)
        return {part: blocks.part(part, form) for part in form.parts}

    def _blocks(self, source: str, form: BlockFormat, start: int, stop: int) -> Blocks:
        if source in self.calibrated:
            return self.calibrated[source].rows(start, stop)
        if keeps_grid(self.checkpoint, source, form):
            return kept_blocks(self.checkpoint, source, start, stop, form)
        rows = self.checkpoint.read_rows(source, start, stop).float()
        return round_to_nearest(rows, form)


def round_to_nearest(rows: torch.Tensor, form: BlockFormat) -> Blocks:
    """Plain rounding to ``form``."""
    codes, scales, zeros = quantize_rtn(rows, form.bits, form.block_size, form.zero_points == "integer")
    return Blocks(codes=codes, scales=scales, zeros=zeros)


def as_stored(values: torch.Tensor, dtype: str) -> npt.NDArray[np.generic]:
    """fp32 values in the width of the stored dtype; bfloat16 as its bits."""
    if dtype == "bfloat16":
        bits: npt.NDArray[np.generic] = values.to(torch.bfloat16).view(torch.int16).numpy()
        return bits
    plain: npt.NDArray[np.generic] = values.to(getattr(torch, dtype)).numpy()
    return plain


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    width = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def ledger(
    plan: WeightsPlan, checkpoint: Checkpoint, how: Callable[[str, BlockFormat], str]
) -> list[dict[str, object]]:
    """What was done to each stored tensor, for ``weights.json``.

    Args:
        how: names the rounding that a quantised source went through.
    """
    rows: list[dict[str, object]] = []
    for entry in plan.entries:
        weight = entry.weight
        rows.append(
            {
                "name": entry.name,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "sources": [{"name": s, "dtype": checkpoint.info(s).dtype} for s in weight.sources],
                "steps": _steps(entry, how),
            }
        )
    return rows


def _steps(entry: StoredTensor, how: Callable[[str, BlockFormat], str]) -> list[str]:
    weight, steps = entry.weight, []
    if len(weight.sources) > 1:
        steps.append("rows of the sources stacked")
    if weight.offset:
        steps.append(f"{weight.offset:g} added")
    if weight.format is None:
        return [*steps, f"stored as {weight.dtype}"]
    form = weight.format
    methods = dict.fromkeys(how(source, form) for source in weight.sources)
    steps.append(f"{form.bits} bits in blocks of {form.block_size}: {'; '.join(methods)}")
    meaning = {
        "codes": "codes, packed",
        "scales": "one scale a block",
        "zeros": "one integer zero point a block, packed",
        "minimums": "one minimum a block, less half the code range times the scale",
        "values": "values",
    }
    return [*steps, f"this tensor: {meaning[entry.part]}"]
