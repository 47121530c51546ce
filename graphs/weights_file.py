"""The bundle's one safetensors file: its layout from a plan, and writing into it in any order.

The header is padded so that the data starts on a page; entries follow without gaps, as the format
asks. ONNX Runtime, TensorRT's uploader and the cuda runtime all map this file.
Source: https://github.com/huggingface/safetensors (format section).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from graphs.weights import ITEM_BYTES, StoredTensor, WeightsPlan

PAGE_BYTES = 4096
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "uint8": "U8", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}


class WeightsLayout:
    """Where each entry of a plan lies in the file.

    Attributes:
        header: the file's first bytes: length, JSON, padding.
        offsets: first byte of each entry, counted from the start of the file.
        size_bytes: length of the whole file.
    """

    def __init__(self, plan: WeightsPlan) -> None:
        position, spans = 0, {}
        for entry in plan.entries:
            spans[entry.name] = (position, position + entry.size_bytes)
            position += entry.size_bytes
        self.header = _header(plan, spans)
        self.offsets = {name: len(self.header) + begin for name, (begin, _) in spans.items()}
        self.size_bytes = len(self.header) + position


def _header(plan: WeightsPlan, spans: dict[str, tuple[int, int]]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt", "producer": "gemma3c"}}
    for entry in plan.entries:
        table[entry.name] = {
            "dtype": _SAFETENSORS_DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": list(spans[entry.name]),
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)


class WeightsFile:
    """A weights file being written; what is never written stays a hole of zeros.

    >>> with WeightsFile(path, layout) as file:                    # doctest: +SKIP
    ...     file.write_rows(entry, 0, array)
    """

    def __init__(self, path: Path, layout: WeightsLayout) -> None:
        self.path, self.layout = path, layout
        self._handle = -1

    def __enter__(self) -> Self:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.truncate(self._handle, self.layout.size_bytes)
            self._write(0, memoryview(self.layout.header))
        except BaseException:
            os.close(self._handle)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def write_rows(self, entry: StoredTensor, row: int, data: npt.NDArray[np.generic]) -> int:
        """Writes rows of a weight from ``row`` on; returns the bytes written. ``data`` has the stored dtype's width."""
        if entry.transposed:
            return self._write_columns(entry, row, data)
        row_bytes = entry.size_bytes // entry.shape[0]
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        assert flat.nbytes % row_bytes == 0, f"{entry.name}: {flat.nbytes} bytes are no whole rows of {row_bytes}"
        assert row * row_bytes + flat.nbytes <= entry.size_bytes, f"{entry.name}: rows beyond its end"
        self._write(self.layout.offsets[entry.name] + row * row_bytes, flat.data)
        return flat.nbytes

    def _write_columns(self, entry: StoredTensor, column: int, data: npt.NDArray[np.generic]) -> int:
        """Writes rows of ``data`` as columns of ``entry`` from ``column`` on: a piece into each of its rows."""
        item, (rows, columns) = ITEM_BYTES[entry.dtype], entry.shape
        assert data.ndim == 2 and data.shape[1] == rows and data.itemsize == item, f"{entry.name}: {data.shape}"
        assert column + len(data) <= columns, f"{entry.name}: columns beyond its end"
        begin = self.layout.offsets[entry.name] + column * item
        for index, piece in enumerate(np.ascontiguousarray(data.T).view(np.uint8)):
            self._write(begin + index * columns * item, piece.data)
        return data.nbytes

    def _write(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._handle, data, offset)
            data, offset = data[written:], offset + written
