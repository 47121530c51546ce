"""Folders as transformers of version 4 and 5 write them, made from transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gemma3_compile.hf_config import to_hf_config
from gemma3_compile.model import Gemma3
from tests.twins import Twin


def write_v5(twin: Twin, folder: Path, shard_bytes: int | None = None) -> Path:
    """As the installed transformers saves it; sharded where ``shard_bytes`` is given."""
    limit = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    twin.save_pretrained(folder, **limit)
    return folder


def write_v4(twin: Twin, model: Gemma3, folder: Path) -> Path:
    """The key layout and config of version 4: ``vision_tower.vision_model.…``, and the tied head written out."""
    write_v5(twin, folder)
    path = folder / "model.safetensors"
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in load_file(path).items()
    }
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf_config(model.config, "v4")))
    return folder


def edit_tensors(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Sets tensors of a safetensors file, or drops those that are None."""
    tensors = {name: tensor for name, tensor in {**load_file(path), **changes}.items() if tensor is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON file."""
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | changes))
