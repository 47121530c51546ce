"""What a lowering rule sees: the builder, the values made so far, and the options of the dialect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir
from torch import Tensor, fx

from graphs.node_args import tensor_value
from graphs.onnx_lowering.builder import Builder
from graphs.weights import Weight
from runtimes.errors import ExportError

Lowered = ir.Value | tuple[ir.Value, ...]
Rule = Callable[["Context", fx.Node], Lowered]
Activations = Literal["int8", "int16"]
WeightSource = Literal["input", "constant"]
ComputeDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class OrtOptions:
    """Choices of the ``ort`` dialect.

    ``activations``: MatMulNBits rounds its input to int8 in blocks. ``int8`` leaves it at that, the fast
    way. ``int16`` multiplies what the rounding leaves over as well, in the same call, so that the
    activations keep about 14 bits: nothing is lost but the weights' own rounding.
    """

    activations: Activations = "int8"


@dataclass(frozen=True, kw_only=True)
class TrtOptions:
    """Choices of the ``trt`` dialect.

    ``weights``: ``input`` makes every weight an input of the network, named as its entry of the weights file, so that
    a plan holds none; ``constant`` leaves them initializers over that file, which the builder copies into the plan.
    ``kernels_hash``: sha256 of the bundle's ``kernels.json``, which plugin nodes carry; empty where there is none.
    ``dtype``: what everything but norms and logits is computed in. TensorRT gets bfloat16; float32 is the same graph
    for hosts that cannot compute in bfloat16.
    ``context``: slots of a global layer's cache, which TensorRT wants static; None takes all that the model can do.
    """

    weights: WeightSource = "input"
    kernels_hash: str = ""
    dtype: ComputeDtype = "bfloat16"
    context: int | None = None


@dataclass(kw_only=True)
class Context:
    """The state of one lowering. ``values`` maps FX nodes to what they became."""

    builder: Builder
    options: OrtOptions | TrtOptions
    weights: dict[str, Weight]
    rules: dict[object, Rule]
    values: dict[fx.Node, Lowered] = field(default_factory=dict)
    split: dict[tuple[ir.Value, int], ir.Value] = field(default_factory=dict)
    """An input of MatMulNBits and its block size, to its int8 part and the rest, joined along the tokens."""
    symbols: dict[tuple[fx.Graph, str], ir.Value] = field(default_factory=dict)
    """Sizes of dynamic dimensions that were read already, by graph and symbol."""
    flat: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """For a value [B, S, N, D] that was reshaped: the [B, S, N * D] it came from."""

    def value(self, argument: object) -> ir.Value:
        """The single ONNX value of an FX argument; a plain weight becomes an initializer when it is first read."""
        if not isinstance(argument, fx.Node):
            raise ExportError(f"expected a tensor, but got {argument!r}")
        weight = self.weight(argument)
        if weight is not None and weight.format is not None:
            raise ExportError(f"`{weight.name}` is quantised ({weight.format}), but is read as a plain tensor")
        if weight is not None:
            return self.builder.weight(weight.stored()[0])
        lowered = self.values[argument]
        if isinstance(lowered, tuple):
            raise ExportError(f"node `{argument.name}` has {len(lowered)} values where one is expected")
        return lowered

    def operand(self, argument: object, like: Tensor) -> ir.Value:
        """A tensor, or a Python number as a constant of ``like``'s dtype."""
        if isinstance(argument, fx.Node):
            return self.value(argument)
        if not isinstance(argument, int | float):
            raise ExportError(f"expected a tensor or a number, but got {argument!r}")
        return self.builder.constant(argument, dtype_name(like))

    def size(self, argument: object) -> ir.Value:
        """A dimension, static or not, as an int64 tensor of one element."""
        return self.builder.constant([argument], "int64") if isinstance(argument, int) else self.value(argument)

    def dimension(self, node: fx.Node, axis: int) -> ir.Value:
        """The size of a dimension as an int64 tensor of one element; read once for each symbol."""
        sizes: Sequence[object] = tensor_value(node).shape  # torch's stubs know of no symbols
        size = sizes[axis]
        if isinstance(size, int):
            return self.size(size)
        symbol = (node.graph, str(size))
        if symbol not in self.symbols:
            self.symbols[symbol] = self.builder.op("Shape", [self.value(node)], start=axis, end=axis + 1)
        return self.symbols[symbol]

    def weight(self, argument: object) -> Weight | None:
        """The recipe behind an FX argument, if it is a weight."""
        return self.weights.get(argument.name) if isinstance(argument, fx.Node) else None

    def lower(self, graph: fx.Graph) -> object:
        """Lowers every node of ``graph`` whose placeholders are in ``values``; returns its output."""
        for node in graph.nodes:
            if node.op == "output":
                return node.args[0]
            if node.op != "placeholder":
                self.values[node] = self._apply(node)
        raise ExportError("the graph has no output")

    def _apply(self, node: fx.Node) -> Lowered:
        rule = self.rules.get(node.target)
        if rule is None:
            raise ExportError(
                f"node `{node.name}`: no rule lowers {node.target} to ONNX",
                hint="add one to a table in graphs/onnx_lowering/",
            )
        self.builder.scope(node.name)
        try:
            return rule(self, node)
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(f"node `{node.name}` ({node.target}): its lowering failed: {error!r}") from error


def dtype_name(value: Tensor) -> str:
    """The dtype as numpy and the builder spell it: ``float32``."""
    return str(value.dtype).removeprefix("torch.")


def merge_tables(*tables: dict[object, Rule]) -> dict[object, Rule]:
    """One table of rules; an op that stands in two tables is an error."""
    merged: dict[object, Rule] = {}
    for table in tables:
        for op, rule in table.items():
            if op in merged:
                raise ExportError(f"two rules lower {op}: {merged[op].__module__} and {rule.__module__}")
            merged[op] = rule
    return merged
