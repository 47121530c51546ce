"""Typed access to the arguments of FX nodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from graphs.node_args import argument, float_arg, int_arg, ints_arg, list_arg, node_arg, tensor_value
from runtimes.errors import ExportError


@pytest.fixture
def node() -> fx.Node:
    """``op(x, 3, 0.5, [1, 2], [x, 4], True, None, scale=2.0)``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2, 3)
    made = graph.call_function(torch.add, (x, 3, 0.5, [1, 2], [x, 4], True, None), {"scale": 2.0})
    made.meta["val"] = (x.meta["val"],)
    return made


def test_what_is_there(node: fx.Node) -> None:
    x = node_arg(node, 0)
    assert x.name == "x" and tensor_value(x).shape == (2, 3)
    assert (int_arg(node, 1), float_arg(node, 2), float_arg(node, 1)) == (3, 0.5, 3.0)
    assert (ints_arg(node, 3), list_arg(node, 4)) == ([1, 2], [x, 4])


def test_by_position_by_name_or_by_default(node: fx.Node) -> None:
    assert argument(node, 1, "scale") == 3
    assert argument(node, 9, "scale") == 2.0
    assert argument(node, 9, "axis", 7) == 7
    assert int_arg(node, 9, 7) == 7


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda n: node_arg(n, 1), "argument 1 must be Node, but got 3"),
        (lambda n: int_arg(n, 2), "argument 2 must be int, but got 0.5"),
        (lambda n: int_arg(n, 5), "argument 5 must be int, but got True"),
        (lambda n: int_arg(n, 9), "argument 9 must be int, but got None"),
        (lambda n: float_arg(n, 6), "argument 6 must be float, but got None"),
        (lambda n: list_arg(n, 1), "argument 1 must be a list, but got 3"),
        (lambda n: ints_arg(n, 4), "argument 4 must be whole numbers, but got"),
        (tensor_value, "expected one tensor, but it gives"),
    ],
)
def test_what_is_not_is_named(node: fx.Node, read: Callable[[fx.Node], object], reason: str) -> None:
    with pytest.raises(ExportError) as caught:
        read(node)
    assert reason in caught.value.message and caught.value.message.startswith("node `add` (")
