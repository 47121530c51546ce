"""The rows whose logits are wanted are picked as early as they can be: right after the last layer's attention.

    y = gather(f(x), 1, rows)  ->  y = f(gather(x, 1, rows))      f: norms, linears, sums, activations

From there on no token looks at another, so of a long prompt only the wanted rows go through the last
feed-forward. A probe inside f then holds those rows only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import fx

from graphs.node_args import argument, node_arg, tensor_value
from graphs.passes.base import Pass, PassResult
from graphs.program import Program

aten = torch.ops.aten

_ROW_BY_ROW = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.gelu.default,
        aten.linear.default,
        aten.rms_norm.default,
        aten.to.dtype,
    }
)


def _row_selection(program: Program) -> fx.Node | None:
    """The gather [B, S, H] -> [B, R, H] along the tokens, if the stage has one."""
    for node in program.graph.nodes:
        if node.target is aten.gather.default and argument(node, 1) == 1:
            found: fx.Node = node
            return found
    return None


def _row_operands(node: fx.Node, program: Program) -> list[fx.Node]:
    """Operands of a node's rank that are no weights: those that have a row for each token."""
    rank = tensor_value(node).dim()
    return [x for x in node.all_input_nodes if x.name not in program.weights and tensor_value(x).dim() == rank]


def _movable(selection: fx.Node, program: Program) -> list[fx.Node]:
    """Nodes above ``selection`` that work row by row and that nothing else reads, the last one first."""
    moved: list[fx.Node] = []
    gone, rank = {selection}, tensor_value(selection).dim()
    for node in reversed(list(program.graph.nodes)):
        if node.target not in _ROW_BY_ROW or tensor_value(node).dim() != rank:
            continue
        rows = str(tensor_value(node).shape[:2])
        same_rows = all(str(tensor_value(x).shape[:2]) == rows for x in _row_operands(node, program))
        if same_rows and node.users and all(user in gone for user in node.users):
            moved.append(node)
            gone.add(node)
    return moved


class _Selector:
    """Makes the gather of any operand, once for each; ``index`` is the selection's own."""

    def __init__(self, graph: fx.Graph, index: fx.Node) -> None:
        self.graph, self.narrow = graph, node_arg(index, 0)
        self.value = tensor_value(index)
        self.made: dict[fx.Node, fx.Node] = {}

    def rows_of(self, x: fx.Node) -> fx.Node:
        if x not in self.made:
            hidden = tensor_value(x).shape[-1]
            shape = (*self.value.shape[:2], hidden)
            wide = self.graph.call_function(aten.expand.default, (self.narrow, [-1, -1, hidden]))
            wide.meta["val"] = self.value.new_empty(shape)
            self.made[x] = self.graph.call_function(aten.gather.default, (x, 1, wide))
            self.made[x].meta["val"] = tensor_value(x).new_empty(shape)
        return self.made[x]


def _replaced(taken: Mapping[fx.Node, fx.Node], operand: fx.Node) -> fx.Node:
    return taken.get(operand, operand)


def run(program: Program) -> PassResult:
    """See the module's docstring."""
    selection = _row_selection(program)
    moved = _movable(selection, program) if selection is not None else []
    if selection is None or not moved:
        return PassResult()
    selector = _Selector(program.graph, node_arg(selection, 2))
    # What the index needs comes after most of what is moved, so all of it is made anew before the selection.
    with program.graph.inserting_before(selection):
        for node in reversed(moved):
            taken = {x: selector.rows_of(x) for x in _row_operands(node, program)}
            copied = program.graph.node_copy(node, partial(_replaced, taken))
            shape = (*selector.value.shape[:2], *tensor_value(node).shape[2:])
            copied.meta["val"] = tensor_value(node).new_empty(shape)
            selector.made[node] = copied
    selection.replace_all_uses_with(selector.made[moved[0]])
    program.probes = {name: selector.made[n] if n in moved else n for name, n in program.probes.items()}
    for node in (selection, *moved):
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    return PassResult(changed=len(moved))


SELECT_ROWS_EARLY = Pass(name="select_rows_early", run=run)
