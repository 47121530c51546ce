"""A checkpoint that is an eager model in memory, and that writes down what was read of it."""

from __future__ import annotations

from torch import Tensor

from gemma3_compile.checkpoints import Checkpoint, TensorInfo
from gemma3_compile.model import Gemma3


class MemoryCheckpoint(Checkpoint):
    """``reads`` holds (name, rows) of every read, in order."""

    def __init__(self, model: Gemma3) -> None:
        self.config, self.source = model.config, "a model in memory"
        self.tensors: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
        self.reads: list[tuple[str, int]] = []

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(shape=tuple(self.tensors[name].shape), dtype="float32")

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        self.reads.append((name, stop - start))
        return self.tensors[name][start:stop].clone()
