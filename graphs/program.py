"""A stage between export and lowering: an FX graph whose placeholders are inputs or weights.

Passes rewrite it; every pass leaves a graph that still runs in torch (see ``run``), so each one can
be checked against the eager model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.export import ExportedProgram

from graphs.stages import Stage
from graphs.weights import BlockFormat, Weight


@dataclass(kw_only=True)
class Program:
    """One stage as an FX graph.

    ``weights`` maps a placeholder's name to its recipe; ``probes`` maps a probe's name
    (``layers.3``) to the node whose value is the residual stream there. ``derived`` counts the
    weights that passes have added.
    """

    stage: Stage
    module: fx.GraphModule
    weights: dict[str, Weight] = field(default_factory=dict)
    probes: dict[str, fx.Node] = field(default_factory=dict)
    derived: int = 0

    @property
    def graph(self) -> fx.Graph:
        """The FX graph that passes rewrite."""
        return self.module.graph

    def input_nodes(self) -> list[fx.Node]:
        """Placeholders that are inputs of the stage, in the stage's order."""
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self.weights]

    def add_weight(self, weight: Weight, near: fx.Node) -> fx.Node:
        """A new placeholder for ``weight``, before the first node; ``near`` gives device and mode."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(f"derived_weight_{self.derived}")
        self.derived += 1
        value = near.meta["val"]
        node.meta["val"] = value.new_empty(weight.shape, dtype=getattr(torch, weight.dtype))
        self.weights[node.name] = weight
        return node

    def drop_dead_weights(self) -> None:
        """Removes weight placeholders that nothing uses any more."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.name in self.weights and not node.users:
                del self.weights[node.name]
                self.graph.erase_node(node)

    def run(
        self, inputs: Mapping[str, torch.Tensor], read: Callable[[Weight], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Runs the graph in torch: stage inputs by name to stage outputs by name."""
        given = dict(zip((n.name for n in self.input_nodes()), (s.name for s in self.stage.inputs), strict=True))
        arguments = [
            read(self.weights[n.name]) if n.name in self.weights else inputs[given[n.name]]
            for n in self.graph.nodes
            if n.op == "placeholder"
        ]
        outputs = fx.Interpreter(self.module).run(*arguments)
        return dict(zip((s.name for s in self.stage.outputs), outputs, strict=True))


def program_from_export(
    exported: ExportedProgram, stage: Stage, *, prefix: str, formats: Mapping[str, BlockFormat]
) -> Program:
    """Wraps a copy of what torch.export made.

    Args:
        prefix: put before a parameter's name to make it canonical (``decoder.`` or ``vision.``).
        formats: the block format of each quantised weight, by canonical name.
    """
    parameters = exported.graph_signature.inputs_to_parameters
    module = fx.GraphModule(exported.graph_module, deepcopy(exported.graph_module.graph))
    program = Program(stage=stage, module=module)
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.target in parameters:
            name = prefix + parameters[node.target].removeprefix("model.")
            value = node.meta["val"]
            program.weights[node.name] = Weight(
                sources=(name,),
                shape=tuple(value.shape),
                dtype=str(value.dtype).removeprefix("torch."),
                format=formats.get(name),
            )
    return program
