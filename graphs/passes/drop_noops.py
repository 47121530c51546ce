"""Removes what torch.export leaves behind and no target needs.

Metadata assertions, casts to the dtype a value has already, slices that keep everything, and
``contiguous``. A cast that changes the dtype stays.
"""

from __future__ import annotations

import torch
from torch import fx

from graphs.passes.base import Pass, PassResult
from graphs.program import Program

aten = torch.ops.aten
KEEP_ALL = 2**63 - 1


def _is_noop(node: fx.Node) -> bool:
    if node.target is aten.to.dtype:
        return bool(node.args[0].meta["val"].dtype == node.args[1])  # type: ignore[union-attr]
    if node.target is aten.slice.Tensor:
        _, _, start, end, *step = node.args
        return start in (0, None) and end == KEEP_ALL and step in ([], [1])
    return node.target in (aten.contiguous.default, aten.alias.default, aten.detach_.default)


def run(program: Program) -> PassResult:
    """See the module's docstring."""
    result = PassResult()
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        elif _is_noop(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
        else:
            continue
        result.changed += 1
    return result


DROP_NOOPS = Pass(name="drop_noops", run=run)
