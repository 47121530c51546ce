"""Folds Gemma's ``1 + w`` into the stored weight of a norm.

    add(weight, 1.0)  ->  a weight with offset 1.0, stored in fp32

Saves an addition a norm and step; the ledger of the bundle says that the offset is in the file.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from graphs.node_args import argument, float_arg, tensor_value
from graphs.passes.base import Pass, PassResult
from graphs.program import Program
from graphs.weights import Weight

aten = torch.ops.aten


def _source_weight(program: Program, node: object) -> fx.Node | None:
    """The weight placeholder behind ``node``, through a cast."""
    if isinstance(node, fx.Node) and node.target is aten.to.dtype:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.name in program.weights else None


def _refusal(weight: Weight, node: fx.Node) -> str | None:
    """Why the sum ``node`` cannot be stored in ``weight``'s place, or None."""
    if weight.format is not None:
        return f"{weight.name}: a quantised weight cannot carry an offset"
    if node.kwargs:
        return f"{weight.name}: {node.name} is no plain sum, it has {dict(node.kwargs)}"
    if tensor_value(node).dtype != torch.float32:
        return f"{weight.name}: the sum is rounded to {tensor_value(node).dtype}, and the file would hold it in float32"
    return None


def run(program: Program) -> PassResult:
    """See the module's docstring."""
    result = PassResult()
    for node in list(program.graph.nodes):
        if node.target is not aten.add.Tensor or not isinstance(argument(node, 1), float | int):
            continue
        source = _source_weight(program, argument(node, 0))
        if source is None:
            continue
        weight = program.weights[source.name]
        if reason := _refusal(weight, node):
            result.refused.append(reason)
            continue
        offset = weight.offset + float_arg(node, 1)
        folded = program.add_weight(replace(weight, offset=offset, dtype="float32"), near=node)
        node.replace_all_uses_with(folded)
        result.changed += 1
    program.graph.eliminate_dead_code()
    program.drop_dead_weights()
    return result


FOLD_NORM_OFFSET = Pass(name="fold_norm_offset", run=run)
