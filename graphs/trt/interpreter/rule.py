"""What a rule of the interpreter is, and what it is given.

A rule says what TensorRT's documentation says of one kind of layer, not what a graph of ours wants. Where the
documentation leaves something open (the order of a sum, the precision inside a layer), a rule computes in fp32 and
rounds once, to the type of the layer's output.

Source: TensorRT for RTX 1.7, Operators; NvInfer.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtimes.errors import ExportError

DTYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64, "INT32": torch.int32,
    "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool, "FP8": torch.float8_e4m3fn, "INT4": torch.int8,
}  # fmt: skip
"""How torch holds TensorRT's types; int4 one number a byte."""
_ROUNDED = (torch.bfloat16, torch.float16)


class InterpreterError(ExportError):
    """A network has something that the interpreter does not know, or does what TensorRT forbids."""


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """A tensor of a network; -1 in ``shape`` is a dimension that varies, ``dtype`` is TensorRT's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A layer as it was read. ``attributes`` holds plain values: names of enums, tuples, names of tensors."""

    kind: str
    name: str
    inputs: tuple[TensorFacts | None, ...]
    outputs: tuple[TensorFacts, ...]
    attributes: Mapping[str, Any]

    def refuse(self, what: str) -> InterpreterError:
        """An error that names this layer."""
        return InterpreterError(f"the layer `{self.name}` ({self.kind}): {what}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One layer with its inputs' values; None where an optional input is not there.

    Args:
        wide: bf16 and fp16 are computed and kept in fp32.
        constant: reads a constant that TensorRT does not show.
    """

    layer: Layer
    inputs: tuple[Tensor | None, ...]
    wide: bool
    constant: Callable[[Layer], Tensor]

    def tensor(self, index: int) -> Tensor:
        """An input that must be there."""
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None:
            raise self.layer.refuse(f"its input {index} is missing")
        return found

    def optional(self, index: int) -> Tensor | None:
        """An input, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def attribute(self, name: str) -> Any:
        """An attribute as it was read."""
        return self.layer.attributes[name]

    def one_of(self, name: str, *allowed: object) -> Any:
        """An attribute that must have one of these values."""
        value = self.attribute(name)
        if value not in allowed:
            raise self.layer.refuse(
                f"`{name}` is {value}, but the interpreter knows {', '.join(map(str, allowed))} only"
            )
        return value

    def only_inputs(self, count: int) -> None:
        """Refuses inputs from ``count`` on."""
        for index, value in enumerate(self.inputs[count:], count):
            if value is not None:
                raise self.layer.refuse(f"the interpreter knows no input {index}")

    def dtype(self, name: str) -> torch.dtype:
        """torch's type for one of TensorRT."""
        return kept_dtype(name, wide=self.wide)

    @property
    def out_dtype(self) -> torch.dtype:
        """The type of the first output."""
        return self.dtype(self.layer.outputs[0].dtype)


def kept_dtype(name: str, *, wide: bool) -> torch.dtype:
    """torch's type for one of TensorRT; fp32 for the short floats where they are kept ``wide``."""
    if name not in DTYPES:
        raise InterpreterError(f"the interpreter knows no tensors of {name}")
    dtype = DTYPES[name]
    return torch.float32 if wide and dtype in _ROUNDED else dtype


Body = Callable[[Call], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a kind of layer is read and computed.

    Args:
        interface: TensorRT's class, without which a layer does not show what it has.
        attributes: all that the class has, beside what every layer has. Another one is an error.
        body: computes it. Its docstring says what TensorRT defines.
    """

    interface: str
    body: Body
    attributes: tuple[str, ...] = ()


def merge_rules(*tables: Mapping[str, Rule]) -> dict[str, Rule]:
    """One table by kind of layer; a kind that stands in two tables is an error."""
    merged: dict[str, Rule] = {}
    for table in tables:
        for kind, rule in table.items():
            if kind in merged:
                raise InterpreterError(f"two rules interpret {kind}: {merged[kind].body} and {rule.body}")
            merged[kind] = rule
    return merged
