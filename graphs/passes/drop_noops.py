"""Removes what torch.export leaves behind and no target needs.

Metadata assertions, casts to the dtype a value has already, slices that keep everything, and
``contiguous``. A cast that changes the dtype stays.
"""

from __future__ import annotations

import torch
from torch import fx

from graphs.node_args import argument, node_arg, tensor_value
from graphs.passes.base import Pass, PassResult
from graphs.program import Program

aten = torch.ops.aten
KEEP_ALL = 2**63 - 1
"""The end of ``x[a:]``, as torch.export writes it."""


def _is_noop(node: fx.Node) -> bool:
    if node.target is aten.to.dtype:
        return tensor_value(node_arg(node, 0)).dtype is argument(node, 1)
    if node.target is aten.slice.Tensor:
        start, end, step = argument(node, 2), argument(node, 3), argument(node, 4, "step", 1)
        return start in (0, None) and end == KEEP_ALL and step == 1
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
            node.replace_all_uses_with(node_arg(node, 0))
            program.graph.erase_node(node)
        else:
            continue
        result.changed += 1
    return result


DROP_NOOPS = Pass(name="drop_noops", run=run)
