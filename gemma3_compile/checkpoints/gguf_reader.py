"""A Gemma 3 in a GGUF file: text-only, quantised or not.

Rows are unpacked a few megabytes at a time. Formats in ``GRID_KINDS`` are read through their grid, so that a
weight and its codes can never disagree; the others through the ``gguf`` package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor

from gemma3_compile.checkpoints.base import BlockGrid, Checkpoint, GridInfo, TensorInfo, check_rows, unknown_tensor
from gemma3_compile.checkpoints.file_bytes import read_bytes
from gemma3_compile.checkpoints.gguf_config import read_config
from gemma3_compile.checkpoints.gguf_grids import GRID_KINDS, unpack_grid
from gemma3_compile.checkpoints.gguf_header import StoredTensor, read_header
from gemma3_compile.checkpoints.gguf_tokenizer import has_tokenizer, rebuild
from gemma3_compile.checkpoints.rename import GGUF, rename
from runtimes.errors import CheckpointError

_CHUNK_ELEMENTS = 1 << 22
"""Weights unpacked at a time: 16 MiB as fp32."""
_EMBEDDING = "decoder.embed_tokens.weight"
_NOT_WEIGHTS = frozenset({Ggml.I8, Ggml.I16, Ggml.I32, Ggml.I64})


class GgufCheckpoint(Checkpoint):
    """See the module. Opening reads the header; ``read`` gives fp32, norms as w (the file holds 1 + w)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.source = path.name
        header = read_header(path)
        self._metadata = header.metadata
        if header.metadata.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                f"{self.source}: this is one part of a GGUF that was split into {header.metadata['split.count']} files",
                hint="merge the parts with `llama-gguf-split --merge`",
            )
        renamed = rename(header.tensors, GGUF, self.source)
        self._plus_one = renamed.plus_one
        self._tensors = {name: header.tensors[stored] for name, stored in renamed.stored.items()}
        self._heads = {name: header.tensors[name] for name in renamed.tied_heads}
        if _EMBEDDING not in self._tensors:
            raise CheckpointError(
                f"{self.source}: the token embedding `token_embd.weight` is missing from {len(self._tensors)} tensors",
                hint="a vision tower (mmproj) or an adapter is no whole model: give the model's own file",
            )
        self.config = read_config(header, self._tensors[_EMBEDDING].shape[0], self.source)
        if not has_tokenizer(header.metadata):
            self.warnings = (f"{self.source}: the file holds no SentencePiece tokenizer, so the bundle gets none",)

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise unknown_tensor(self.source, name)
        return self._tensors[name]

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def info(self, name: str) -> TensorInfo:
        stored = self._stored(name)
        return TensorInfo(shape=stored.shape, dtype=stored.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        stored = self._stored(name)
        check_rows(self.source, name, stored.shape, start, stop)
        if len(stored.shape) == 1:
            rows = self._dequantize(name, stored, 0, 1)[0, start:stop].clone()
        else:
            rows = torch.empty((stop - start, math.prod(stored.shape[1:])))
            for first, last in self._chunks(stored, start, stop):
                rows[first - start : last - start] = self._dequantize(name, stored, first, last)
            rows = rows.view(stop - start, *stored.shape[1:])
        return rows.sub_(1.0) if name in self._plus_one else rows

    def grid_info(self, name: str) -> GridInfo | None:
        stored = self._stored(name)
        kind = GRID_KINDS.get(stored.ggml_type)
        return kind.info if kind is not None and len(stored.shape) == 2 and name not in self._plus_one else None

    def read_grid_rows(self, name: str, start: int, stop: int) -> BlockGrid:
        stored, info = self._stored(name), self.grid_info(name)
        check_rows(self.source, name, stored.shape, start, stop)
        if info is None:
            return super().read_grid_rows(name, start, stop)
        blocks = (stop - start, stored.shape[1] // info.block_size)
        grid = BlockGrid(
            codes=torch.empty((stop - start, stored.shape[1]), dtype=torch.uint8),
            scales=torch.empty(blocks),
            zeros=torch.empty(blocks),
            minimums=None if info.integer_zero else torch.empty(blocks),
            bits=info.bits,
            block_size=info.block_size,
        )
        for first, last in self._chunks(stored, start, stop):
            part = unpack_grid(self._raw(stored, first, last), GRID_KINDS[stored.ggml_type])
            at = slice(first - start, last - start)
            grid.codes[at], grid.scales[at], grid.zeros[at] = part.codes, part.scales, part.zeros
            if grid.minimums is not None and part.minimums is not None:
                grid.minimums[at] = part.minimums
        return grid

    def tokenizer(self) -> bytes | None:
        return rebuild(self._metadata, self.config.tokens, self.source)

    def check_stored(self) -> None:
        """A stored head must have the embedding's shape; its values are quantised apart and are not compared."""
        for name, stored in self._heads.items():
            if stored.shape != self._stored(_EMBEDDING).shape:
                raise CheckpointError(
                    f"{self.source}: `{name}` has shape {stored.shape}, but the embedding it is tied to has "
                    f"{self._stored(_EMBEDDING).shape}",
                    hint="gemma3c compiles Gemma 3 with a tied head only",
                )

    def _chunks(self, stored: StoredTensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
        step = max(1, _CHUNK_ELEMENTS // math.prod(stored.shape[1:]))
        return ((first, min(first + step, stop)) for first in range(start, stop, step))

    def _raw(self, stored: StoredTensor, start: int, stop: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Packed bytes of rows ``start`` to ``stop``: uint8 [rows, bytes]; a vector is one row."""
        row_bytes = stored.row_bytes * math.prod(stored.shape[1:-1])
        raw = read_bytes(self._path, stored.offset + start * row_bytes, (stop - start) * row_bytes)
        return raw.reshape(stop - start, row_bytes)

    def _dequantize(self, name: str, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """fp32 [rows, elements in a row]."""
        raw = self._raw(stored, start, stop)
        if stored.ggml_type in GRID_KINDS:
            return unpack_grid(raw, GRID_KINDS[stored.ggml_type]).dequantize()
        if stored.ggml_type == Ggml.F64:
            return torch.from_numpy(raw.view("<f8").astype(np.float32))
        try:
            if stored.ggml_type in _NOT_WEIGHTS:
                raise NotImplementedError
            return torch.from_numpy(np.array(gguf.dequantize(raw, stored.ggml_type), dtype=np.float32))
        except NotImplementedError:
            raise CheckpointError(
                f"{self.source}: tensor `{name}` is stored as {stored.dtype}, which cannot be dequantised",
                hint="quantise the checkpoint in another format, such as Q8_0 or Q4_K_M",
            ) from None
