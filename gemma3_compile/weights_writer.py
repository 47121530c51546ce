"""Follows the recipes of a WeightsPlan: reads a checkpoint row by row and writes the bundle's weights file.

At most a few million weights are in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gemma3_compile.blocks import Blocks, as_stored, keeps_codes, kept_blocks
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.quantize.rounding import in_blocks, quantize_rtn
from graphs.weights import BlockFormat, Part, StoredTensor, Weight, WeightsPlan
from graphs.weights_file import WeightsFile
from runtimes.progress import SILENT, Advance, Progress

CHUNK_ELEMENTS = 1 << 23
"""Weights that are in memory at a time, in fp32 and as codes."""


@dataclass(frozen=True, kw_only=True)
class SourceSpan:
    """Where one checkpoint tensor goes: from row ``row`` of ``weight``, in each of its stored parts."""

    weight: Weight
    row: int
    entries: tuple[StoredTensor, ...]


@dataclass(kw_only=True)
class WeightsWriter:
    """Writes every weight of ``plan``.

    ``calibrated`` yields sources that are quantised elsewhere, with their rows. Each is written as it
    comes and forgotten, in whatever order; the rest is read from the checkpoint and rounded here.
    """

    plan: WeightsPlan
    checkpoint: Checkpoint
    file: WeightsFile
    calibrated: Iterable[tuple[str, Blocks]] = ()

    def write(self, progress: Progress = SILENT) -> frozenset[str]:
        """Writes everything, with a bar over the bytes; returns the names that ``calibrated`` brought."""
        spans = self._spans()
        taken: set[str] = set()
        for source, blocks in self.calibrated:
            self._write_source(source, spans[source], blocks, lambda written: None)
            taken.add(source)
        rest = {source: places for source, places in spans.items() if source not in taken}
        total = sum(self._bytes(source, places) for source, places in rest.items())
        with progress.task("writing weights", total=total, unit="bytes") as advance:
            for source, places in rest.items():
                self._write_source(source, places, None, advance)
        return frozenset(taken)

    def _spans(self) -> dict[str, list[SourceSpan]]:
        """Where the rows of every checkpoint tensor go, in the order of the file."""
        entries: dict[Weight, list[StoredTensor]] = {}
        for entry in self.plan.entries:
            entries.setdefault(entry.weight, []).append(entry)
        spans: dict[str, list[SourceSpan]] = {}
        for weight, parts in entries.items():
            row = 0
            for source in weight.sources:
                spans.setdefault(source, []).append(SourceSpan(weight=weight, row=row, entries=tuple(parts)))
                row += self._shape(source)[0]
        return spans

    def _shape(self, source: str) -> tuple[int, ...]:
        return self.checkpoint.info(source).shape

    def _bytes(self, source: str, places: list[SourceSpan]) -> int:
        row_bytes = sum(e.size_bytes // e.weight.shape[0] for place in places for e in place.entries)
        return row_bytes * self._shape(source)[0]

    def _write_source(self, source: str, places: list[SourceSpan], blocks: Blocks | None, advance: Advance) -> None:
        """Writes one source: ``blocks`` where it was quantised already, else what the checkpoint holds."""
        for place in places:
            for start, stop in _chunks(self._shape(source)):
                parts = self._parts(source, place.weight, blocks, start, stop)
                for entry in place.entries:
                    advance(self.file.write_rows(entry, place.row + start, parts[entry.part]))

    def _parts(
        self, source: str, weight: Weight, blocks: Blocks | None, start: int, stop: int
    ) -> dict[Part, npt.NDArray[np.generic]]:
        """Rows of one source in every part that the weight is stored in; they are read and rounded once."""
        form = weight.format
        if form is None:
            values = self.checkpoint.read_rows(source, start, stop).float() + weight.offset
            return {"values": as_stored(values, weight.dtype)}
        rows = self._blocks(source, form, start, stop) if blocks is None else blocks.rows(start, stop)
        return {part: rows.part(part, form) for part in form.parts}

    def _blocks(self, source: str, form: BlockFormat, start: int, stop: int) -> Blocks:
        if keeps_codes(self.checkpoint, source, form):
            return kept_blocks(self.checkpoint, source, start, stop, form)
        rows = self.checkpoint.read_rows(source, start, stop).float()
        return round_to_nearest(rows, form)


def round_to_nearest(rows: torch.Tensor, form: BlockFormat) -> Blocks:
    """Plain rounding to ``form``. Codes are chosen for the scales as they are stored."""
    if form.codes == "e4m3":
        return _round_to_e4m3(rows)
    block_size = form.block_size or rows.shape[1]
    codes, scales, zeros = quantize_rtn(rows, form.bits, block_size, form.zero_points == "integer")
    if form.scales != "float32":
        scales = scales.to(getattr(torch, form.scales)).float()
        middle = 1 << (form.bits - 1)
        steps = (in_blocks(rows, block_size) / scales[:, :, None]).round().clamp(-middle, middle - 1)
        codes = (steps + middle).to(torch.uint8).flatten(1)[:, : rows.shape[1]].contiguous()
    return Blocks(codes=codes, scales=scales, zeros=zeros)


def _round_to_e4m3(rows: torch.Tensor) -> Blocks:
    """Each row's largest magnitude becomes e4m3's own; the scale is rounded to bfloat16 before the codes are chosen."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = (rows.abs().amax(1, keepdim=True) / largest).clamp(min=torch.finfo(torch.bfloat16).tiny)
    scales = scales.to(torch.bfloat16).float()
    codes = (rows / scales).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return Blocks(codes=codes.view(torch.uint8), scales=scales)


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
    steps.append(f"{_kind(form)}: {'; '.join(methods)}")
    meaning = {
        "codes": "codes, transposed" if form.whole_rows else "codes, packed",
        "scales": "one scale a row" if form.whole_rows else "one scale a block",
        "zeros": "one integer zero point a block, packed",
        "minimums": "one minimum a block, less half the code range times the scale",
        "values": "values",
    }
    return [*steps, f"this tensor: {meaning[entry.part]}"]


def _kind(form: BlockFormat) -> str:
    """A format in words; `validate` reads them back."""
    blocks = "rows" if form.whole_rows else f"blocks of {form.block_size}"
    if form.codes == "unsigned":
        return f"{form.bits} bits in {blocks}"
    codes = "e4m3" if form.codes == "e4m3" else f"{form.bits} signed bits"
    return f"{codes} in {blocks} with {form.scales} scales"
