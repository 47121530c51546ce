"""The header of a safetensors file, with every bound checked before a byte of data is read.

Source: https://github.com/huggingface/safetensors, section "Format": 8 bytes with the header's length, the
header as JSON, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import CheckpointError

_DAMAGED = "the file is damaged or was not downloaded to its end: fetch it again"
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
_FLOATS: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
}
_OTHERS: Mapping[str, int] = {
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
_MAGICS: Mapping[bytes, tuple[str, str]] = {
    b"version ": ("a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull` or `hf download`"),
    b"PK\x03\x04": ("a zip archive, as PyTorch's pickle files are", "pickle files are refused: convert to safetensors"),
    b"\x80\x02": ("a pickle file", "pickle files are refused, they run code: convert to safetensors"),
    b"GGUF": ("a GGUF file", "give the file the ending .gguf"),
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of one file. ``offset`` counts from the file's start; ``item_bytes`` is the dtype's size."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    item_bytes: int


def read_header(path: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of a safetensors file by its stored name.

    Raises CheckpointError where the file cannot be read, is something else, or is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            refuse_other_formats(path, first)
            if len(first) < 8:
                raise _damaged(path, f"it has {size} bytes, too few for a header")
            length = int.from_bytes(first, "little")
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, f"its header is said to have {length:,} bytes, but the file has {size:,}")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: cannot be read ({error.strerror})", hint="check the path and its permissions"
        ) from error
    return _parse(path, header, data_start=8 + length, size=size)


def refuse_other_formats(path: Path, first: bytes) -> None:
    """Raises CheckpointError where the first bytes are those of a pickle, an LFS pointer or a GGUF."""
    for magic, (what, hint) in _MAGICS.items():
        if first.startswith(magic):
            raise CheckpointError(f"{path.name}: this is {what}", hint=hint)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: damaged safetensors file: {what}", hint=_DAMAGED)


def _parse(path: Path, header: bytes, *, data_start: int, size: int) -> Mapping[str, StoredTensor]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    return {name: _entry(path, name, entry, data_start, size) for name, entry in entries.items()}


def _naturals(value: Any) -> tuple[int, ...] | None:
    """A list of integers from 0 up, None for anything else."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None


def _entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    shape, span, code = _naturals(fields.get("shape")), _naturals(fields.get("data_offsets")), fields.get("dtype")
    if shape is None or span is None or len(span) != 2 or not isinstance(code, str):
        raise _damaged(path, f"the entry of tensor `{name}` lacks a dtype, a shape or two offsets")
    if code not in _FLOATS and code not in _OTHERS:
        raise CheckpointError(
            f"{path.name}: tensor `{name}` has the dtype {code}, which is not read",
            hint="give the checkpoint as it was published, in bfloat16 or float32",
        )
    dtype, item_bytes = _FLOATS[code] if code in _FLOATS else (code.lower(), _OTHERS[code])
    start, stop = span
    if stop - start != math.prod(shape) * item_bytes:
        raise _damaged(path, f"tensor `{name}` of {code} {list(shape)} cannot have {stop - start:,} bytes")
    if data_start + stop > size:
        raise _damaged(path, f"tensor `{name}` ends at byte {data_start + stop:,}, but the file has {size:,}")
    return StoredTensor(path=path, shape=shape, dtype=dtype, offset=data_start + start, item_bytes=item_bytes)
