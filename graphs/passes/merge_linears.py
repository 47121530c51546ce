"""Linear layers that read one input become one: q, k and v; gate and up.

    linear(x, a), linear(x, b)  ->  split(linear(x, [a; b]))

One product reads the activations (and quantises them, where a target does that) once.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from graphs.passes.base import Pass, PassResult
from graphs.program import Program

aten = torch.ops.aten


def _siblings(program: Program) -> list[list[fx.Node]]:
    """Groups of linears without bias over the same input, in graph order."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is aten.linear.default and len(node.args) == 2 and node.args[1].name in program.weights:
            groups.setdefault(node.args[0], []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _refusal(program: Program, group: list[fx.Node]) -> str | None:
    """Why the weights of ``group`` cannot be stacked, or None."""
    weights = [program.weights[node.args[1].name] for node in group]  # type: ignore[union-attr]
    if len({(w.format, w.dtype) for w in weights}) > 1:
        return f"{'+'.join(w.name for w in weights)}: formats differ ({', '.join(str(w.format) for w in weights)})"
    if len({w.name.rsplit(".", 2)[0] for w in weights}) > 1:
        return f"{'+'.join(w.name for w in weights)}: they belong to different modules"
    return None


def _merge(program: Program, group: list[fx.Node]) -> None:
    graph, x = program.graph, group[0].args[0]
    assert isinstance(x, fx.Node)
    weights = [program.weights[node.args[1].name] for node in group]  # type: ignore[union-attr]
    rows = [weight.shape[0] for weight in weights]
    stacked = replace(
        weights[0],
        sources=tuple(source for weight in weights for source in weight.sources),
        shape=(sum(rows), weights[0].shape[1]),
    )
    parameter = program.add_weight(stacked, near=group[0])
    with graph.inserting_after(x):
        merged = graph.call_function(aten.linear.default, (x, parameter))
    merged.meta["val"] = x.meta["val"].new_empty((*x.meta["val"].shape[:-1], sum(rows)))
    with graph.inserting_after(merged):
        split = graph.call_function(aten.split_with_sizes.default, (merged, rows, -1))
    split.meta["val"] = [node.meta["val"] for node in group]
    for index, node in reversed(list(enumerate(group))):
        with graph.inserting_after(split):
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
