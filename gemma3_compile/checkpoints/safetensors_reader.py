"""A Gemma 3 in safetensors files, single or sharded, as transformers writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma3_compile.checkpoints.base import DTYPES, Checkpoint, TensorInfo, check_rows, unknown_tensor
from gemma3_compile.checkpoints.file_bytes import read_bytes
from gemma3_compile.checkpoints.rename import SAFETENSORS, rename
from gemma3_compile.checkpoints.safetensors_header import StoredTensor, read_header, refuse_other_formats
from gemma3_compile.config import ModelConfig
from runtimes.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_EMBEDDING = "decoder.embed_tokens.weight"
_COMPARED_ROWS = 8192
"""Rows of a stored head compared with the embedding at a time."""


class SafetensorsCheckpoint(Checkpoint):
    """Tensors keep their stored dtype.

    Args:
        files: every file of the model's weights.
        config: the model they belong to.
        folder: where the side files lie (tokenizer.model, preprocessor_config.json).
        source: see :class:`Checkpoint`.
    """

    def __init__(self, files: tuple[Path, ...], *, config: ModelConfig, folder: Path, source: str) -> None:
        self.config, self.source, self._folder = config, source, folder
        stored: dict[str, StoredTensor] = {}
        for path in files:
            for name, tensor in read_header(path).items():
                if name in stored:
                    raise CheckpointError(
                        f"{source}: tensor `{name}` is in {stored[name].path.name} and in {path.name}",
                        hint="the folder mixes two checkpoints: fetch it again into an empty one",
                    )
                stored[name] = tensor
        renamed = rename(stored, SAFETENSORS, source)
        self._tensors = {name: stored[as_stored] for name, as_stored in renamed.stored.items()}
        self._heads = {name: stored[name] for name in renamed.tied_heads}
        self._refuse_quantised()
        self.warnings = self._missing_tokenizer()

    def _refuse_quantised(self) -> None:
        for name, stored in (*self._tensors.items(), *self._heads.items()):
            if stored.dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.source}: tensor `{name}` is stored as {stored.dtype}, expected a float of 16 bits or more",
                    hint="this checkpoint was quantised by another tool: give the original, or a GGUF of it",
                )

    def _missing_tokenizer(self) -> tuple[str, ...]:
        if (self._folder / "tokenizer.model").is_file():
            return ()
        there = "only tokenizer.json is" if (self._folder / "tokenizer.json").is_file() else "no tokenizer is"
        warning = (
            f"{self.source}: tokenizer.model is missing ({there} there), so the bundle gets no tokenizer; "
            "copy tokenizer.model from the original Gemma 3 checkpoint beside the weights"
        )
        return (warning,)

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
        return _read_rows(stored, start, stop)

    def tokenizer(self) -> bytes | None:
        path = self._folder / "tokenizer.model"
        if not path.is_file():
            return None
        model = read_bytes(path, 0, path.stat().st_size).tobytes()
        refuse_other_formats(path, model[:8])
        return model

    def image_settings(self) -> dict[str, Any] | None:
        path = self._folder / "preprocessor_config.json"
        return read_json(path) if path.is_file() else None

    def check_stored(self) -> None:
        """A stored head must equal the embedding, since the model has one tensor for both."""
        for name, head in self._heads.items():
            embedding = self._stored(_EMBEDDING)
            if head.shape != embedding.shape:
                raise CheckpointError(
                    f"{self.source}: `{name}` has shape {list(head.shape)}, but the embedding it is tied to has "
                    f"{list(embedding.shape)}",
                    hint="gemma3c compiles Gemma 3 with a tied head only",
                )
            for start in range(0, head.shape[0], _COMPARED_ROWS):
                stop = min(start + _COMPARED_ROWS, head.shape[0])
                if not torch.equal(_read_rows(head, start, stop), _read_rows(embedding, start, stop)):
                    raise CheckpointError(
                        f"{self.source}: `{name}` differs from the embedding it is tied to, in rows {start} to {stop}",
                        hint="the head was trained apart from the embedding, which gemma3c does not compile",
                    )


def _read_rows(stored: StoredTensor, start: int, stop: int) -> Tensor:
    if start == stop:  # torch views no empty bytes as floats
        return torch.empty((0, *stored.shape[1:]), dtype=DTYPES[stored.dtype])
    row_bytes = math.prod(stored.shape[1:]) * stored.item_bytes
    raw = read_bytes(stored.path, stored.offset + start * row_bytes, (stop - start) * row_bytes)
    return torch.from_numpy(raw).view(DTYPES[stored.dtype]).view(stop - start, *stored.shape[1:])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where it is none."""
    try:
        parsed = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})", hint="check the path") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not JSON ({error})", hint="fetch the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path.name}: a JSON object was expected, but it holds a {type(parsed).__name__}")
    return parsed


def shards(folder: Path) -> tuple[Path, ...]:
    """The files that ``model.safetensors.index.json`` names.

    Raises CheckpointError where the index is damaged, names a file outside the folder, or one that is missing.
    """
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{INDEX}: `weight_map` must lead from tensors to files", hint="fetch the file again")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if name != Path(name).name]:
        raise CheckpointError(
            f"{INDEX}: {outside[0]!r} is no plain file name", hint="the index must not leave its folder"
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder.name}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:5])}",
            hint="the download is not complete: fetch the checkpoint again",
        )
    return tuple(folder / name for name in names)
