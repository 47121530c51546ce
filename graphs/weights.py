"""What a compiled graph asks of the weights file: recipes, not data.

A ``Weight`` says which checkpoint tensors make one operand and how. A ``StoredTensor`` is one entry
of the bundle's safetensors file. A quantised weight becomes several entries (codes, scales, ...).
No tensor data is touched here; the writer follows the recipes one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from runtimes.errors import ExportError

ZeroPoints = Literal["none", "integer", "minimum"]
Codes = Literal["unsigned", "signed", "e4m3"]
ScaleDtype = Literal["float32", "bfloat16"]
Part = Literal["values", "codes", "scales", "zeros", "minimums"]

WHOLE_ROW = 0
"""A block size: all columns, whatever their number."""


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """Weights in blocks along the input dimension: w = (code - zero) * scale.

    ``zero_points``: ``none`` means 2**(bits-1); ``integer`` one packed integer a block; ``minimum``
    means w = (code - 2**(bits-1)) * scale - minimum with an fp32 minimum a block, which holds a
    q4_K grid exactly.

    ``codes``: ``unsigned`` counts from 0; ``signed`` stores code - 2**(bits-1) in two's complement, of which
    TensorRT's int4 is one; ``e4m3`` holds floating-point numbers of eight bits, w = code * scale.
    ``block_size`` may be ``WHOLE_ROW`` for those two in eight bits: one scale a row. Such codes are stored
    transposed, [columns, rows], the one form in which TensorRT multiplies by them as they are.
    ``scales`` is the dtype in which scales are stored.
    """

    bits: Literal[4, 8]
    block_size: int
    zero_points: ZeroPoints
    codes: Codes = "unsigned"
    scales: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        if self.codes != "unsigned" and self.zero_points != "none":
            raise ExportError(f"{self.codes} codes have no zero points, but got `{self.zero_points}`")
        one_a_row = self.bits == 8 and self.whole_rows
        if self.codes == "e4m3" and not one_a_row:
            raise ExportError(f"e4m3 codes have eight bits and one scale a row, but got {self}")
        if self.codes != "unsigned" and one_a_row:
            return
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise ExportError(f"`block_size` must be a power of two of at least 16, but got {self.block_size}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The stored tensors that make up one weight of this format."""
        last: dict[ZeroPoints, tuple[Part, ...]] = {"none": (), "integer": ("zeros",), "minimum": ("minimums",)}
        return ("codes", "scales", *last[self.zero_points])

    @property
    def whole_rows(self) -> bool:
        """Whether a row has one scale, and the codes lie transposed."""
        return self.block_size == WHOLE_ROW

    def blocks(self, columns: int) -> int:
        """Blocks in a row of ``columns`` weights; the last one may be padded."""
        if self.whole_rows:
            return 1
        return -(-columns // self.block_size)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """An operand: ``sources`` stacked along dimension 0, plus ``offset``; ``shape`` is the result's."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    offset: float = 0.0
    format: BlockFormat | None = None

    @property
    def name(self) -> str:
        """The stored name: the source's own, or the common prefix with the stacked leaves."""
        if len(self.sources) == 1:
            return self.sources[0]
        head, tail = self.sources[0].rsplit(".", 2)[0], self.sources[0].rsplit(".", 1)[1]
        leaves = "+".join(source.rsplit(".", 2)[1] for source in self.sources)
        return f"{head}.{leaves}.{tail}"

    def stored(self) -> tuple[StoredTensor, ...]:
        """The entries of the weights file that this weight needs."""
        if self.format is None:
            return (StoredTensor(name=self.name, dtype=self.dtype, shape=self.shape, part="values", weight=self),)
        rows, columns = self.shape
        bits, blocks = self.format.bits, self.format.blocks(columns)
        codes: tuple[str, tuple[int, ...]] = ("uint8", (rows, blocks, self.format.block_size * bits // 8))
        scales: tuple[int, ...] = (rows, blocks)
        if self.format.whole_rows:
            codes = ("float8_e4m3fn" if self.format.codes == "e4m3" else "int8", (columns, rows))
            scales = (rows,)
        shapes: dict[Part, tuple[str, tuple[int, ...]]] = {
            "codes": codes,
            "scales": (self.format.scales, scales),
            "zeros": ("uint8", (rows, -(-blocks * bits // 8))),
            "minimums": ("float32", (rows, blocks)),
        }
        return tuple(
            StoredTensor(
                name=f"{self.name}.{part}", dtype=shapes[part][0], shape=shapes[part][1], part=part, weight=self
            )
            for part in self.format.parts
        )


ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "uint8": 1, "int8": 1, "float8_e4m3fn": 1}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One entry of the weights file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: Part
    weight: Weight

    @property
    def transposed(self) -> bool:
        """Whether the weight's rows are this entry's columns."""
        return self.part == "codes" and self.weight.format is not None and self.weight.format.whole_rows

    @property
    def size_bytes(self) -> int:
        """Bytes of the entry's data."""
        count = ITEM_BYTES[self.dtype]
        for dim in self.shape:
            count *= dim
        return count


@dataclass(frozen=True, kw_only=True)
class WeightsPlan:
    """All entries of a weights file, in the order in which they are written, each once."""

    entries: tuple[StoredTensor, ...]

    @classmethod
    def merge(cls, groups: Iterable[Iterable[StoredTensor]]) -> WeightsPlan:
        """The union of what several graphs ask for.

        Raises:
            ExportError: two graphs ask for different tensors under one name.
        """
        seen: dict[str, StoredTensor] = {}
        for entry in (entry for group in groups for entry in group):
            if seen.setdefault(entry.name, entry) != entry:
                raise ExportError(
                    f"two graphs want different tensors named `{entry.name}`: {seen[entry.name]} and {entry}"
                )
        return cls(entries=tuple(sorted(seen.values(), key=_write_order)))

    @property
    def size_bytes(self) -> int:
        """Bytes of all data together, without the header."""
        return sum(entry.size_bytes for entry in self.entries)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The distinct weights, in the order in which their first entry is written."""
        return tuple(dict.fromkeys(entry.weight for entry in self.entries))


def _write_order(entry: StoredTensor) -> tuple[bool, int, tuple[str, ...], str]:
    """Entries whose size keeps 64-byte alignment first; the others by item size, so that each item stays aligned.

    Then by name, with numbers in numeric order.
    """
    odd = entry.size_bytes % 64 != 0
    parts = tuple(f"{int(part):06d}" if part.isdigit() else part for part in entry.weight.name.split("."))
    return odd, -ITEM_BYTES[entry.dtype] if odd else 0, parts, entry.name
