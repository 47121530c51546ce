"""The header of a GGUF file: metadata and where each tensor lies.

The ``gguf`` package reads headers too, but makes a numpy view of each of the tokenizer's 800,000 entries
(15 seconds for a Gemma) and meets a truncated file with an IndexError. This reader takes a tenth of a
second and checks every bound. Names, types and block sizes still come from the package.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from runtimes.errors import CheckpointError

_DAMAGED = "the file is damaged or was not downloaded to its end: fetch it again"
_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""GGUF value types to struct codes; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of the file. ``shape`` is row-major (ggml's reversed), ``offset`` counts from the file's start."""

    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def dtype(self) -> str:
        """As ggml writes it: ``q4_K``, ``q8_0``; floats by their long name."""
        longer = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        name = self.ggml_type.name
        return longer.get(name) or name.replace("Q", "q", 1).replace("Iq", "iq").replace("Tq", "tq")


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """All of a GGUF file but the tensors' data."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


class _Cursor:
    """Reads little-endian values one after the other and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: damaged GGUF header at byte {self.at:,}: {what}", hint=_DAMAGED)

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise self.fail(f"{what} needs {count:,} bytes, but the file ends at {len(self.data):,}")
        taken = self.data[self.at : self.at + count]
        self.at += count
        return taken

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.scalar("Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def strings(self, count: int, what: str) -> list[bytes]:
        """An array of strings, as bytes: a tokenizer's pieces, hundreds of thousands of them."""
        if count > (len(self.data) - self.at) // 8:
            raise self.fail(f"{what} is said to hold {count:,} strings, more than the file has room for")
        return [self.take(self.scalar("Q", what), what) for _ in range(count)]

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.fail(f"{what} is of value type {kind}, which does not exist")
        item, count = self.scalar("I", what), self.scalar("Q", what)
        if item == _STRING:
            return self.strings(count, what)
        if item not in _SCALARS:
            raise self.fail(f"{what} is an array of value type {item}, which is not read")
        dtype = np.dtype("<" + _SCALARS[item]) if _SCALARS[item] != "?" else np.dtype(np.bool_)
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype=dtype)


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, row-major shape, ggml type and offset inside the data."""
    name = cursor.string("a tensor's name")
    what = f"the entry of tensor `{name}`"
    dims = cursor.scalar("I", what)
    if not 1 <= dims <= _MAX_DIMS:
        raise cursor.fail(f"{what} has {dims} dimensions, expected 1 to {_MAX_DIMS}")
    shape = tuple(cursor.scalar("Q", what) for _ in range(dims))[::-1]
    return name, shape, cursor.scalar("I", what), cursor.scalar("Q", what)


def _place(cursor: _Cursor, data_start: int, name: str, shape: tuple[int, ...], kind: int, at: int) -> StoredTensor:
    """Checks one tensor's entry against the file's size."""
    try:
        ggml_type = GGMLQuantizationType(kind)
    except ValueError:
        raise cursor.fail(f"tensor `{name}` is of ggml type {kind}, which the gguf package does not know") from None
    if min(shape) < 1:
        raise cursor.fail(f"tensor `{name}` has the shape {list(shape)}, expected no empty dimension")
    block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block_size:
        raise cursor.fail(f"tensor `{name}` has rows of {shape[-1]}, no multiple of {ggml_type.name}'s {block_size}")
    row_bytes = shape[-1] // block_size * block_bytes
    end = data_start + at + row_bytes * math.prod(shape[:-1])
    if end > len(cursor.data):
        raise CheckpointError(
            f"{cursor.path.name}: tensor `{name}` ends at byte {end:,}, but the file has {len(cursor.data):,} bytes",
            hint=_DAMAGED,
        )
    return StoredTensor(shape=shape, ggml_type=ggml_type, offset=data_start + at, row_bytes=row_bytes)


def read_header(path: Path) -> GgufHeader:
    """Reads and checks the header of ``path``.

    Raises CheckpointError where the file is no GGUF, of a version that is not read, or damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path.name}: not a GGUF file (it does not begin with `GGUF`)", hint=_DAMAGED)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path))
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: cannot be read ({error.strerror})", hint="check the path and its permissions"
        ) from error


def _parse(cursor: _Cursor) -> GgufHeader:
    cursor.take(4, "the magic")
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        raise CheckpointError(
            f"{cursor.path.name}: GGUF version {version} is not read, expected 2 or 3 in little-endian order",
            hint="write the file again with a current llama.cpp",
        )
    tensor_count, pair_count = cursor.scalar("Q", "the counts"), cursor.scalar("Q", "the counts")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string("a metadata key")
        metadata[key] = cursor.value(cursor.scalar("I", f"the type of `{key}`"), f"the value of `{key}`")
    entries = [_read_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.fail(f"`general.alignment` must be a positive number, but is {alignment!r}")
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for entry in entries:
        if entry[0] in tensors:
            raise cursor.fail(f"tensor `{entry[0]}` is listed twice")
        tensors[entry[0]] = _place(cursor, data_start, *entry)
    return GgufHeader(metadata=metadata, tensors=tensors)
