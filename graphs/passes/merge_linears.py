"""Linear layers that read one input become one: q, k and v; gate and up.

    linear(x, a), linear(x, b)  ->  split(linear(x, [a; b]))

One product reads the activations (and quantises them, where a target does that) once.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from graphs.node_args import argument, node_arg, tensor_value
from graphs.passes.base import Pass, PassResult
from graphs.program import Program
from graphs.weights import Weight

aten = torch.ops.aten


def _siblings(program: Program) -> list[list[fx.Node]]:
    """Groups of linears over the same input, in graph order."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is aten.linear.default and node_arg(node, 1).name in program.weights:
            groups.setdefault(node_arg(node, 0), []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _weights(program: Program, group: list[fx.Node]) -> list[Weight]:
    return [program.weights[node_arg(node, 1).name] for node in group]


def _refusal(program: Program, group: list[fx.Node]) -> str | None:
    """Why the weights of ``group`` cannot be stacked, or None."""
    weights = _weights(program, group)
    names = "+".join(weight.name for weight in weights)
    if any(argument(node, 2, "bias") is not None for node in group):
        return f"{names}: they have biases"
    if len({(w.format, w.dtype, w.offset) for w in weights}) > 1:
        return f"{names}: formats differ ({', '.join(str(w.format or w.dtype) for w in weights)})"
    if len({w.name.rsplit(".", 2)[0] for w in weights}) > 1:
        return f"{names}: they belong to different modules"
    return None


def _merge(program: Program, group: list[fx.Node]) -> None:
    graph, x = program.graph, node_arg(group[0], 0)
    weights = _weights(program, group)
    rows = [weight.shape[0] for weight in weights]
    stacked = replace(
        weights[0],
        sources=tuple(source for weight in weights for source in weight.sources),
        shape=(sum(rows), weights[0].shape[1]),
    )
    parameter = program.add_weight(stacked, near=group[0])
    with graph.inserting_before(group[0]):
        merged = graph.call_function(aten.linear.default, (x, parameter))
        split = graph.call_function(aten.split_with_sizes.default, (merged, rows, -1))
    value = tensor_value(x)
    merged.meta["val"] = value.new_empty((*value.shape[:-1], sum(rows)))
    split.meta["val"] = [tensor_value(node) for node in group]
    for index, node in enumerate(group):
        with graph.inserting_before(node):
            part = graph.call_function(operator.getitem, (split, index))
        part.meta.update(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def run(program: Program) -> PassResult:
    """See the module's docstring."""
    result = PassResult()
    for group in _siblings(program):
        if reason := _refusal(program, group):
            result.refused.append(reason)
            continue
        _merge(program, group)
        result.changed += 1
    program.drop_dead_weights()
    return result


MERGE_LINEARS = Pass(name="merge_linears", run=run)
