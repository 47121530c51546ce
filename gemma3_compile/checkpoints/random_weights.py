"""Weights without a checkpoint: the same for a seed and a tensor's name on every machine, in any order of reading.

A weight is the sum of four random bytes, shifted and scaled (nearly normal, within 3.5 standard deviations), and
stored as bfloat16 as published checkpoints are. The bytes come from SFC64, whose stream numpy promises not to
change; each run of 2**18 weights has a generator of its own, so that rows are read without those before them.

The scales keep activations near one: a linear layer has std fan_in ** -0.5, the embedding hidden ** -0.5 (it is
multiplied by its root), RMSNorm w has std 0.1 around 0 and LayerNorm weights around 1, biases std 0.02. The norms of
queries and keys stand around 0.6, so that attention is sharp enough for a wrong mask or angle to show.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemma3_compile.checkpoints.base import Checkpoint, TensorInfo, check_rows, unknown_tensor
from gemma3_compile.checkpoints.check import expected_shapes
from gemma3_compile.config import ModelConfig

_RUN = 1 << 18
"""Weights of one generator."""
_BYTES_MEAN = 4 * 127.5
_BYTES_STD = math.sqrt(4 * (256**2 - 1) / 12)

Scale = Callable[[tuple[int, ...]], tuple[float, float]]

_SCALES: tuple[tuple[str, Scale], ...] = (
    (r"vision\..*(layer_norm\d|post_layernorm)\.weight", lambda shape: (1.0, 0.1)),
    (r".*[qk]_norm\.weight", lambda shape: (0.6, 0.2)),
    (r".*norm\.weight", lambda shape: (0.0, 0.1)),
    (r".*\.bias", lambda shape: (0.0, 0.02)),
    (r"vision\.position_embedding\.weight", lambda shape: (0.0, 0.5)),
    (r"vision\.input_projection\.weight", lambda shape: (0.0, shape[0] ** -0.5)),
    (r".*", lambda shape: (0.0, math.prod(shape[1:]) ** -0.5)),
)
"""Mean and standard deviation by canonical name; the first pattern that matches the whole name counts."""


def _near_normal(key: str, run: int) -> npt.NDArray[np.float32]:
    """``_RUN`` values of mean 0 and variance 1."""
    digest = hashlib.sha256(f"{key}:{run}".encode()).digest()
    generator = np.random.SFC64(np.random.SeedSequence(int.from_bytes(digest[:16], "little")))
    words = np.asarray(generator.random_raw(_RUN // 2), dtype="<u8").view("<u4")
    sums = words & np.uint32(0x00FF00FF)  # in place from here on: fresh arrays would take most of the time
    words >>= np.uint32(8)
    words &= np.uint32(0x00FF00FF)
    sums += words
    high = sums >> np.uint32(16)
    sums &= np.uint32(0xFFFF)
    sums += high
    values = sums.astype(np.float32)
    values -= np.float32(_BYTES_MEAN)
    values *= np.float32(1 / _BYTES_STD)
    return values


class RandomCheckpoint(Checkpoint):
    """A model of ``config``'s shape with weights made from ``seed`` as they are read."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self._seed = config, seed
        self.source = f"random weights, size {config.name}, seed {seed}"
        self._shapes: Mapping[str, tuple[int, ...]] = expected_shapes(config)
        if config.name != "nano":
            self.warnings = (f"{self.source}: random weights of this size come without a tokenizer",)

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def info(self, name: str) -> TensorInfo:
        if name not in self._shapes:
            raise unknown_tensor(self.source, name)
        return TensorInfo(shape=self._shapes[name], dtype="bfloat16")

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        shape = self.info(name).shape
        check_rows(self.source, name, shape, start, stop)
        mean, std = next(scale(shape) for pattern, scale in _SCALES if re.fullmatch(pattern, name))
        columns = math.prod(shape[1:])
        first, last = start * columns, stop * columns
        flat = torch.empty(last - first, dtype=torch.bfloat16)
        for run in range(first // _RUN, -(-last // _RUN)):
            at, end = max(first, run * _RUN), min(last, (run + 1) * _RUN)
            values = _near_normal(f"{self._seed}:{name}", run)[at - run * _RUN : end - run * _RUN]
            values *= np.float32(std)
            values += np.float32(mean)
            flat[at - first : end - first] = torch.from_numpy(values)
        return flat.view(stop - start, *shape[1:])

    def tokenizer(self) -> bytes | None:
        """``nano`` brings a tokenizer of its own; the other sizes have none without a checkpoint."""
        if self.config.name != "nano":
            return None
        from gemma3_compile.nano_tokenizer import nano_tokenizer  # trains a model: only when asked for

        return nano_tokenizer()
