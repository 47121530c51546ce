"""Typed access to what an FX node was called with; FX itself says only ``Argument``.

Every function raises ExportError, naming the node, where an argument is missing or of another type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, fx

from runtimes.errors import ExportError

T = TypeVar("T")


def tensor_value(node: fx.Node) -> Tensor:
    """The fake tensor that ``node`` computes: shape (symbols included) and dtype."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise ExportError(f"node `{node.name}` ({node.target}): expected one tensor, but it gives {value!r}")
    return value


def argument(node: fx.Node, index: int, name: str = "", default: object = None) -> object:
    """Argument ``index``, whether it was passed by position or as ``name``."""
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def _typed(node: fx.Node, index: int, kind: type[T]) -> T:
    value = argument(node, index)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ExportError(
            f"node `{node.name}` ({node.target}): argument {index} must be {kind.__name__}, but got {value!r}"
        )
    return value


def node_arg(node: fx.Node, index: int) -> fx.Node:
    """An argument that is another node."""
    return _typed(node, index, fx.Node)


def int_arg(node: fx.Node, index: int, default: int | None = None) -> int:
    """A static whole number."""
    if default is not None and index >= len(node.args):
        return default
    return _typed(node, index, int)


def float_arg(node: fx.Node, index: int) -> float:
    """A static number."""
    value = argument(node, index)
    return float(value) if isinstance(value, int) else _typed(node, index, float)


def list_arg(node: fx.Node, index: int) -> Sequence[object]:
    """A list of numbers or nodes."""
    value = argument(node, index)
    if not isinstance(value, list | tuple):
        raise ExportError(f"node `{node.name}` ({node.target}): argument {index} must be a list, but got {value!r}")
    return value


def ints_arg(node: fx.Node, index: int) -> list[int]:
    """A list of static whole numbers."""
    values = list_arg(node, index)
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) != len(values):
        raise ExportError(
            f"node `{node.name}` ({node.target}): argument {index} must be whole numbers, but got {list(values)!r}"
        )
    return numbers


def only_arguments(node: fx.Node, count: int) -> None:
    """Refuses arguments beyond the first ``count``, which a rule would otherwise drop without a word."""
    extra = [*node.args[count:], *node.kwargs.items()]
    if extra:
        raise ExportError(f"node `{node.name}` ({node.target}): its arguments {extra} cannot be lowered")
