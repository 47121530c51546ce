"""Where the reference takes its weights from: a checkpoint, or the bundle's own weights file.

Legend: N rows, K columns, n blocks in a row, b block size.

With the bundle's own weights, what is left between bundle and eager model is the graph's; with the
checkpoint's, what rounding the weights cost comes on top. One tensor is read at a time.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.checkpoints.check import expected_shapes
from gemma3_compile.config import ModelConfig
from graphs.weights import WHOLE_ROW, BlockFormat, Part, ZeroPoints
from runtimes.bundle import Bundle
from runtimes.errors import BundleError

_ROWS_ELEMENTS = 1 << 22
_OFFSET = re.compile(r"(\S+) added")
_FORMAT = re.compile(
    r"(?:(?P<bits>\d+) (?P<signed>signed )?bits|e4m3) in (?:blocks of (?P<block>\d+)|rows)\b"
    r"(?: with (?P<scales>\w+) scales)?.*"
)
_PARTS: tuple[Part, ...] = ("codes", "scales", "zeros", "minimums")


class Weights(ABC):
    """Tensors of the eager model in fp32, by canonical name.

    Attributes:
        config: the model that they belong to.
        label: what a report calls them.
    """

    config: ModelConfig
    label: str

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The whole tensor as the eager model wants it (a norm's raw w of ``1 + w``), fp32."""

    def read_all(self, names: Iterable[str], prefix: str) -> dict[str, Tensor]:
        """The tensors ``prefix + name`` by ``name``."""
        return {name: self.read(prefix + name) for name in names}


class CheckpointWeights(Weights):
    """What the bundle was built from."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.config, self.label = checkpoint, checkpoint.config, "checkpoint"

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).float()


class InBfloat16(Weights):
    """The same tensors for the eager model in bfloat16: all but the factors of RMSNorm, which it reads in fp32."""

    def __init__(self, weights: Weights) -> None:
        self.exact, self.config, self.label = weights, weights.config, f"{weights.label}, in bfloat16"

    def read(self, name: str) -> Tensor:
        tensor = self.exact.read(name)
        of_rms_norm = name == "vision.soft_emb_norm.weight" or (name.startswith("decoder.") and tensor.dim() == 1)
        return tensor if of_rms_norm else tensor.to(torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """One entry or group of entries of the weights file, and the rows of it that are one tensor."""

    base: str
    first_row: int
    offset: float
    form: BlockFormat | None
    kept: bool


class BundleWeights(Weights):
    """What stands in the bundle's weights file, read back by what its ledger says.

    Args:
        config: the model that the bundle claims to hold.

    Raises:
        BundleError: the ledger cannot be read, or lacks a tensor of the model.
    """

    def __init__(self, bundle: Bundle, config: ModelConfig) -> None:
        from safetensors import SafetensorError, safe_open

        self.config, self.label = config, "own weights"
        self.shapes = expected_shapes(config)
        self._where = str(bundle.root)
        ledger = bundle.path(bundle.manifest.weights.ledger)
        try:
            self._stored = _places(json.loads(ledger.read_text(encoding="utf-8")), self.shapes)
            self._file: Any = safe_open(str(bundle.path(bundle.manifest.weights.file)), "pt")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise BundleError(
                f"{bundle.root}: its weights cannot be read back: {error!r}",
                hint="`gemma3c verify` finds a damaged file; or build the bundle again",
            ) from error
        part = {"vision": "vision.", "decoder": "decoder."}
        built = tuple(prefix for stage, prefix in part.items() if stage in bundle.manifest.stages)
        missing = sorted(name for name in self.shapes if name.startswith(built) and name not in self._stored)
        if missing:
            raise BundleError(f"{bundle.root}: the ledger lacks {len(missing)} tensors, such as {missing[0]}")

    def form(self, name: str) -> BlockFormat | None:
        """The format in which ``name`` is stored; None where it is stored as floats."""
        return self._stored[name].form

    def keeps(self, name: str) -> bool:
        """Whether ``name`` stands on the checkpoint's own grid, exactly."""
        return self._stored[name].kept

    def shortened(self, name: str) -> bool:
        """Whether ``name`` is stored in bfloat16, not in blocks."""
        stored = self._stored[name]
        return stored.form is None and self._file.get_slice(stored.base).get_dtype() == "BF16"

    def holds(self, name: str) -> bool:
        """Whether the bundle has the tensor ``name`` at all."""
        return name in self._stored

    def read(self, name: str) -> Tensor:
        stored, shape = self._stored[name], self.shapes[name]
        rows = shape[0]
        if stored.form is None:
            values: Tensor = self._rows(stored.base, stored.first_row, rows).float()
            return (values - stored.offset if stored.offset else values).reshape(shape)
        out = torch.empty(shape)
        step = max(1, _ROWS_ELEMENTS // shape[1])
        for row in range(0, rows, step):
            count = min(step, rows - row)
            first = stored.first_row + row
            parts = {
                part: self._rows(
                    f"{stored.base}.{part}", first, count, turned=part == "codes" and stored.form.whole_rows
                )
                for part in stored.form.parts
            }
            out[row : row + count] = dequantize(parts, stored.form)[:, : shape[1]]
        return out

    def _rows(self, entry: str, first: int, count: int, *, turned: bool = False) -> Tensor:
        """Rows of a tensor, which are the entry's columns where it lies turned."""
        part = self._file.get_slice(entry)
        rows: Tensor = part[:, first : first + count].T if turned else part[first : first + count]
        if len(rows) != count:
            raise BundleError(f"{self._where}: `{entry}` has too few rows: {first + count} were expected")
        return rows


def dequantize(parts: Mapping[Part, Tensor], form: BlockFormat) -> Tensor:
    """The weights [N, n b] in fp32 of rows as they are stored, the last block's padding included.

    ``(code - zero) * scale``, or ``(code - middle) * scale - minimum`` with ``middle`` = 2 ** (bits - 1). Signed codes and
    floats of eight bits have no zero: ``code * scale``.
    """
    if form.codes != "unsigned":
        signed = parts["codes"].float() if form.whole_rows else _signed(_unpack(parts["codes"], form.bits), form.bits)
        return (signed * parts["scales"].float().unsqueeze(-1)).flatten(1)
    codes_Nnb = _unpack(parts["codes"], form.bits).float()
    if form.zero_points == "integer":
        zeros_Nn1: Tensor | float = _unpack(parts["zeros"], form.bits)[:, : codes_Nnb.shape[1], None].float()
    else:
        zeros_Nn1 = float(1 << (form.bits - 1))
    weights_Nnb = codes_Nnb.sub_(zeros_Nn1).mul_(parts["scales"][:, :, None])
    if form.zero_points == "minimum":
        weights_Nnb.sub_(parts["minimums"][:, :, None])
    return weights_Nnb.flatten(1)


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a module that was made on the meta device its weights, without copying them."""
    module.load_state_dict(dict(tensors), assign=True)
    module.eval().requires_grad_(False)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes, one a byte, of what ``graphs.packing`` packed along the last dimension."""
    if bits == 8:
        return packed
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Two's complement in ``bits`` bits, as floats."""
    middle = 1 << (bits - 1)
    return (codes ^ middle).float() - middle


def _places(ledger: list[dict[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Stored]:
    """Where each tensor of the model stands, by canonical name."""
    places: dict[str, _Stored] = {}
    groups = _groups(ledger)
    for base, parts in groups.items():
        steps = next(iter(parts.values()))["steps"]
        offset = next((float(found[1]) for step in steps if (found := _OFFSET.fullmatch(step))), 0.0)
        form = _form(base, set(parts), steps)
        kept = any(_is_kept(step) for step in steps)
        row = 0
        for source in next(iter(parts.values()))["sources"]:
            name = source["name"]
            places.setdefault(name, _Stored(base=base, first_row=row, offset=offset, form=form, kept=kept))
            row += shapes[name][0] if name in shapes else 0
    return places


def _is_kept(step: str) -> bool:
    """Whether a step of the ledger says that every source stands on its own grid."""
    return _FORMAT.fullmatch(step) is not None and all(
        "own" in method and method.endswith("exactly") for method in step.partition(": ")[2].split("; ")
    )


def _groups(ledger: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The ledger's rows by weight and part; a weight stored as it is has the one part ``values``."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in ledger:
        base, _, part = row["name"].rpartition(".")
        if part not in _PARTS:
            base, part = row["name"], "values"
        groups.setdefault(base, {})[part] = row
    return groups


def _form(base: str, parts: set[str], steps: list[str]) -> BlockFormat | None:
    if "codes" not in parts:
        return None
    found = next((match for step in steps if (match := _FORMAT.fullmatch(step))), None)
    if found is None:
        raise ValueError(f"the ledger does not say how `{base}` is packed: {steps}")
    zero_points: ZeroPoints = "integer" if "zeros" in parts else "minimum" if "minimums" in parts else "none"
    bits, scales = int(found["bits"] or 8), found["scales"] or "float32"
    if bits not in (4, 8) or scales not in ("float32", "bfloat16"):
        raise ValueError(f"`{base}` is packed in {bits} bits with {scales} scales, which this version cannot read")
    return BlockFormat(
        bits=4 if bits == 4 else 8,
        block_size=int(found["block"] or WHOLE_ROW),
        zero_points=zero_points,
        codes="e4m3" if found["bits"] is None else "signed" if found["signed"] else "unsigned",
        scales="float32" if scales == "float32" else "bfloat16",
    )
