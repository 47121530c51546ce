"""What every checkpoint offers, whatever file it comes from.

Legend: N rows (output features, or the vocabulary), K columns (input features), b block size.

A checkpoint is read lazily: opening it reads headers only, and no method holds more than the rows
that were asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gemma3_compile.config import ModelConfig
from runtimes.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A stored tensor: its shape, and its dtype as stored (``bfloat16``, ``float32``, ``q4_K``)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class GridInfo:
    """The quantisation grid that a tensor is stored on.

    ``bits`` is the narrowest of 4 and 8 that holds every code, ``block_size`` the columns that share
    one scale, ``kind`` ggml's name for the format. ``integer_zero`` is False where the zero point is a
    float (q4_K).
    """

    bits: int
    block_size: int
    kind: str
    integer_zero: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockGrid:
    """Quantised rows, one code to a byte.

    The weight is ``(code - zero) * scale`` in fp32. Where ``minimums`` is None that is exact to the bit.
    Otherwise the exact form is ``code * scale - minimum``, and the form with a zero point differs from it
    by roundings only, at most ``2**-22 * (15 * |scale| + |minimum|)``.

    Args:
        codes: uint8 [N, K], below ``2 ** bits``.
        scales: fp32 [N, K / b].
        zeros: fp32 [N, K / b].
        minimums: fp32 [N, K / b], or None.
        bits: 4 or 8.
        block_size: b, 16 or 32.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    minimums: Tensor | None
    bits: int
    block_size: int

    def dequantize(self) -> Tensor:
        """The exact weights, fp32 [N, K]."""
        rows, columns = self.codes.shape
        blocks = self.codes.view(rows, columns // self.block_size, self.block_size).float()
        if self.minimums is None:
            blocks.sub_(self.zeros[:, :, None]).mul_(self.scales[:, :, None])
        else:
            blocks.mul_(self.scales[:, :, None]).sub_(self.minimums[:, :, None])
        return blocks.view(rows, columns)


class Checkpoint(ABC):
    """Named tensors under gemma3c's canonical names, with the model's configuration and side files.

    Attributes:
        config: the model that the tensors belong to.
        source: where they come from, in words fit for a bundle's manifest (no absolute path, no secret).
        warnings: what a user should know about this checkpoint, one sentence each.
    """

    config: ModelConfig
    source: str
    warnings: tuple[str, ...] = ()

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Canonical names of all stored tensors (the parameter names of the eager model)."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and stored dtype, without reading the tensor. Raises CheckpointError for an unknown name."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (of dimension 0) as a float tensor that nobody else holds.

        Dequantised tensors are fp32, others keep their stored dtype. Norm weights are the raw w of ``1 + w``.
        Raises CheckpointError for an unknown name, rows outside the tensor, or a file that ends too soon.
        """

    def read(self, name: str) -> Tensor:
        """The whole tensor; see :meth:`read_rows`."""
        return self.read_rows(name, 0, row_count(self.info(name).shape))

    def grid_info(self, name: str) -> GridInfo | None:
        """The grid that the tensor is stored on, None where it is stored as floats or on no grid we keep."""
        self.info(name)
        return None

    def read_grid_rows(self, name: str, start: int, stop: int) -> BlockGrid:
        """Rows ``start`` to ``stop`` on their stored grid. Raises CheckpointError where there is none."""
        raise CheckpointError(
            f"{self.source}: tensor `{name}` is stored as {self.info(name).dtype}, which is not a grid that is kept",
            hint="choose a dtype other than the checkpoint's own grid",
        )

    def read_grid(self, name: str) -> BlockGrid:
        """The whole tensor on its stored grid; see :meth:`read_grid_rows`."""
        return self.read_grid_rows(name, 0, row_count(self.info(name).shape))

    def tokenizer(self) -> bytes | None:
        """A serialized SentencePiece model, None where the checkpoint brings none (see ``warnings``)."""
        return None

    def image_settings(self) -> dict[str, Any] | None:
        """What ``preprocessor_config.json`` says, None where there is no such file."""
        return None

    def check_stored(self) -> None:
        """Checks of the format's own that read data (a stored head against the tied embedding).

        Raises CheckpointError.
        """
        return

    def close(self) -> None:
        """Closes the files. Safe to call twice."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def row_count(shape: tuple[int, ...]) -> int:
    """Length of dimension 0; a scalar counts as one row, which :func:`check_rows` then refuses."""
    return shape[0] if shape else 1


def check_rows(source: str, name: str, shape: tuple[int, ...], start: int, stop: int) -> None:
    """Raises CheckpointError unless the tensor has rows and ``0 <= start <= stop <= shape[0]`` holds."""
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise CheckpointError(
            f"{source}: rows {start} to {stop} of tensor `{name}` were asked for, but its shape is {list(shape)}",
            hint="`check_tensors` lists the tensors whose shape is not the model's",
        )


def unknown_tensor(source: str, name: str) -> CheckpointError:
    """The error for a name that the checkpoint does not hold."""
    return CheckpointError(
        f"{source}: there is no tensor `{name}`", hint="`check_tensors` lists what is missing and what is extra"
    )


DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Stored dtypes that are read as they are."""
