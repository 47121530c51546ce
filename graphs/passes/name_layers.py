"""Marks the residual stream after each layer, so that validation can ask a target for it.

The value is the last node that torch.export traced inside module ``layers.i``.
"""

from __future__ import annotations

import re

from torch import fx

from graphs.passes.base import Pass, PassResult
from graphs.program import Program

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:$|\.)")


def _layer_of(node: fx.Node) -> int | None:
    for path, _ in reversed(list(node.meta.get("nn_module_stack", {}).values())):
        if found := _LAYER.search(path):
            return int(found.group(1))
    return None


def run(program: Program) -> PassResult:
    """See the module's docstring."""
    for node in program.graph.nodes:
        layer = _layer_of(node) if node.op == "call_function" else None
        if layer is not None and hasattr(node.meta["val"], "shape"):
            program.probes[f"layers.{layer}"] = node
    return PassResult(changed=len(program.probes))


NAME_LAYERS = Pass(name="name_layers", run=run)
