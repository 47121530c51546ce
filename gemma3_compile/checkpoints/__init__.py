"""Checkpoints: where weights come from, read lazily under canonical names."""

from __future__ import annotations

from gemma3_compile.checkpoints.base import BlockGrid, Checkpoint, GridInfo, TensorInfo
from gemma3_compile.checkpoints.check import check_tensors, load_eager
from gemma3_compile.checkpoints.open import open_checkpoint

__all__ = [
    "BlockGrid",
    "Checkpoint",
    "GridInfo",
    "TensorInfo",
    "check_tensors",
    "load_eager",
    "open_checkpoint",
]
