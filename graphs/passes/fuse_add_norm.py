"""The residual addition and the norm that reads its sum become one node.

    s = add(a, b); n = rms_norm(s)  ->  n, s = gemma3c.add_rms_norm(a, b)

Every target has a kernel for the pair, which reads the residual stream once.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphs.node_args import argument, tensor_value
from graphs.ops import gemma3c
from graphs.passes.base import Pass, PassResult
from graphs.program import Program

aten = torch.ops.aten


def _refusal(norm: fx.Node, total: fx.Node) -> str | None:
    """Why ``norm`` cannot take over ``total``, or None."""
    a, b = argument(total, 0), argument(total, 1)
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or total.kwargs:
        return f"{total.name}: not the plain sum of two tensors"
    if tensor_value(a).shape != tensor_value(b).shape:
        return f"{total.name}: shapes differ, {tuple(tensor_value(a).shape)} and {tuple(tensor_value(b).shape)}"
    if argument(norm, 2) is None or argument(norm, 3) is None:
        return f"{norm.name}: the norm has no scale or no epsilon"
    if any(user < norm for user in total.users):
        return f"{total.name}: it is read before {norm.name}, where the fused node would stand"
    return None


def run(program: Program) -> PassResult:
    """See the module's docstring."""
    result, graph = PassResult(), program.graph
    for norm in list(graph.nodes):
        total = norm.args[0] if norm.target is aten.rms_norm.default else None
        if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor:
            continue
        if reason := _refusal(norm, total):
            result.refused.append(reason)
            continue
        with graph.inserting_before(norm):
            fused = graph.call_function(
                gemma3c.add_rms_norm.default, (total.args[0], total.args[1], norm.args[2], norm.args[3])
            )
            normed = graph.call_function(operator.getitem, (fused, 0))
            added = graph.call_function(operator.getitem, (fused, 1))
        fused.meta["val"] = (norm.meta["val"], total.meta["val"])
        normed.meta.update(norm.meta)
        added.meta.update(total.meta)
        norm.replace_all_uses_with(normed)
        total.replace_all_uses_with(added)
        program.probes = {name: added if node is total else node for name, node in program.probes.items()}
        graph.erase_node(norm)
        graph.erase_node(total)
        result.changed += 1
    return result


FUSE_ADD_NORM = Pass(name="fuse_add_norm", run=run)
