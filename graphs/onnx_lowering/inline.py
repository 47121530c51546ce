"""Lowers a custom op by its meaning: the torch oracle is traced and its graph lowered in place.

So the ONNX fallback of an op and the oracle of its kernel cannot part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from graphs.node_args import tensor_value
from graphs.onnx_lowering.context import Context
from graphs.passes.drop_noops import run as drop_noops
from graphs.program import Program
from graphs.stages import Stage
from runtimes.errors import ExportError

Body = Callable[..., Tensor | tuple[Tensor, ...]]


class _Body(nn.Module):
    """A function of tensors with its constants bound, as torch.export wants it."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.body(*tensors)


def _sizes(arguments: Sequence[Tensor]) -> dict[str, int]:
    """An example size for every symbolic dimension, all different and none 0 or 1."""
    symbols = dict.fromkeys(str(dim) for x in arguments for dim in x.shape if not isinstance(dim, int))
    return {symbol: 3 + 4 * index for index, symbol in enumerate(symbols)}


def trace(body: Body, arguments: Sequence[Tensor]) -> fx.Graph:
    """The graph of ``body`` over tensors shaped like ``arguments``, symbols staying dynamic."""
    sizes = _sizes(arguments)
    dims = {symbol: Dim(f"d{index}", min=1) for index, symbol in enumerate(sizes)}
    examples = tuple(
        torch.zeros([dim if isinstance(dim, int) else sizes[str(dim)] for dim in x.shape], dtype=x.dtype)
        for x in arguments
    )
    shapes = tuple({i: dims[str(d)] for i, d in enumerate(x.shape) if not isinstance(d, int)} for x in arguments)
    exported = torch.export.export(_Body(body), examples, dynamic_shapes=(shapes,), strict=False)
    stage = Stage(name="decoder", inputs=(), outputs=())
    program = Program(stage=stage, module=fx.GraphModule(exported.graph_module, exported.graph_module.graph))
    drop_noops(program)
    return program.graph


class Inliner:
    """Traces each body once for each set of shapes, and lowers the trace wherever the op occurs."""

    def __init__(self) -> None:
        self._traces: dict[object, fx.Graph] = {}

    def lower(
        self,
        ctx: Context,
        key: object,
        body: Body,
        arguments: Sequence[fx.Node],
        values: Sequence[ir.Value] | None = None,
    ) -> tuple[ir.Value, ...]:
        """Lowers ``body`` over FX ``arguments``.

        Args:
            key: names the body with its constants.
            values: what the arguments became, where that is not what ``ctx`` holds for them.
        """
        lowered = [ctx.value(node) for node in arguments] if values is None else values
        return self.lower_over(ctx, key, body, [tensor_value(node) for node in arguments], lowered)

    def lower_over(
        self, ctx: Context, key: object, body: Body, fakes: Sequence[Tensor], values: Sequence[ir.Value]
    ) -> tuple[ir.Value, ...]:
        """Lowers ``body`` over ``values``, which have the shapes and dtypes of ``fakes``."""
        signature = (key, tuple((str(tuple(x.shape)), x.dtype) for x in fakes))
        if signature not in self._traces:
            self._traces[signature] = trace(body, fakes)
        graph = self._traces[signature]
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        ctx.values.update(zip(placeholders, values, strict=True))
        outputs = ctx.lower(graph)
        if not isinstance(outputs, list | tuple):
            raise ExportError(f"the body {key} must give a tuple of tensors, but gives {outputs!r}")
        return tuple(ctx.value(node) for node in outputs)
