"""Builds one ONNX graph: nodes in order, small constants once, weights by reference.

A weight's initializer has a name, a dtype and dimensions, but no data: ``bind_weights`` points it
into the bundle's safetensors file when the layout of that file is known.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphs.weights import StoredTensor
from runtimes.errors import ExportError

OPSET = 24
MICROSOFT = "com.microsoft"
_ONNX_ALONE: Mapping[str, int] = MappingProxyType({})
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
}


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """A value that reads ``entry`` of the weights file, its bytes seen as ``dtype`` with dimensions ``shape``."""

    value: ir.Value
    entry: StoredTensor
    shape: tuple[int, ...]
    dtype: str


class Builder:
    """Collects the nodes of a graph; rules call ``op``, ``constant`` and ``weight``."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: dict[str, ir.Value] = {}
        self.weight_uses: dict[str, WeightUse] = {}
        self.functions: dict[tuple[str, str], ir.Function] = {}
        self._prefix = ""
        self._counts: Counter[str] = Counter()
        self._computed: dict[tuple[object, ...], tuple[ir.Value, ...]] = {}

    def scope(self, prefix: str) -> None:
        """Names the nodes that follow after the FX node they come from."""
        self._prefix = prefix

    def _name(self, op_type: str) -> str:
        stem = f"{self._prefix}/{op_type}"
        self._counts[stem] += 1
        return stem if self._counts[stem] == 1 else f"{stem}_{self._counts[stem]}"

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        """A graph input."""
        value = ir.Value(name=name, type=ir.TensorType(DTYPES[dtype]), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def named(self, value: ir.Value, name: str) -> ir.Value:
        """Gives a value a name that others may look for."""
        value.name = name
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        **attributes: int | float | str | Sequence[int] | ir.TensorProtocol,
    ) -> ir.Value:
        """Appends a node with one output."""
        return self.multi(op_type, inputs, 1, domain=domain, **attributes)[0]

    def multi(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int | Sequence[bool],
        *,
        domain: str = "",
        **attributes: int | float | str | Sequence[int] | ir.TensorProtocol,
    ) -> tuple[ir.Value, ...]:
        """Appends a node with several outputs; a False in ``outputs`` is one that is left out.

        A node that computes what an earlier one does is that earlier one: masks and sizes that every
        layer asks for stand in the graph once.
        """
        wanted = [True] * outputs if isinstance(outputs, int) else list(outputs)
        key = (domain, op_type, tuple(inputs), tuple(wanted), repr(sorted(attributes.items())))
        if key in self._computed:
            return self._computed[key]
        name = self._name(op_type)
        values = [ir.Value(name=f"{name}:{i}" if used else "") for i, used in enumerate(wanted)]
        self.nodes.append(
            ir.Node(domain, op_type, inputs, ir.convenience.convert_attributes(attributes), outputs=values, name=name)
        )
        self._computed[key] = tuple(values)
        return self._computed[key]

    def constant(self, data: npt.ArrayLike, dtype: str) -> ir.Value:
        """A small constant, stored in the graph itself; equal ones share one initializer."""
        array = np.ascontiguousarray(np.asarray(data, dtype=dtype)) if np.ndim(data) else np.asarray(data, dtype=dtype)
        flat = "_".join(str(x) for x in array.ravel()[:8])
        name = f"const.{dtype}.{'x'.join(map(str, array.shape))}.{flat}"
        if array.size > 8:
            name += f".{hashlib.sha256(array.tobytes()).hexdigest()[:12]}"
        if name not in self.initializers:
            self.initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(DTYPES[dtype]),
                shape=ir.Shape(array.shape),
                const_value=ir.Tensor(array, name=name),
            )
        return self.initializers[name]

    def weight(self, entry: StoredTensor, shape: Sequence[int] | None = None, *, dtype: str | None = None) -> ir.Value:
        """A value over ``entry``; ``shape`` and ``dtype`` see the same bytes in another way.

        It has the entry's name; with another shape alone that, too, is in the name, so that a graph may see both.

        Raises:
            ExportError: another tensor of this graph has the name of ``entry``.
        """
        dims = tuple(shape) if shape is not None else entry.shape
        kind = dtype or entry.dtype
        name = entry.name if dtype or dims == entry.shape else f"{entry.name}@{'x'.join(map(str, dims))}"
        if name not in self.weight_uses:
            value = ir.Value(name=name, type=ir.TensorType(DTYPES[kind]), shape=ir.Shape(dims))
            self.weight_uses[name] = WeightUse(value=value, entry=entry, shape=dims, dtype=kind)
        use = self.weight_uses[name]
        if (use.entry, use.shape, use.dtype) != (entry, dims, kind):
            raise ExportError(f"the graph wants two different tensors named `{entry.name}`: {use.entry} and {entry}")
        return use.value

    def model(
        self,
        name: str,
        outputs: Sequence[ir.Value],
        *,
        domains: Mapping[str, int] = _ONNX_ALONE,
        weight_inputs: bool = False,
    ) -> ir.Model:
        """The finished graph, with nodes that nothing uses left out.

        Args:
            domains: the version of each operator set beside ONNX's own.
            weight_inputs: weights are inputs after the stage's own, not initializers.
        """
        nodes, initializers = self._live(outputs)
        weights = [use.value for use in self.weight_uses.values()] if weight_inputs else []
        fed = {id(value) for value in weights}
        graph = ir.Graph(
            [*self.inputs, *(value for value in initializers if id(value) in fed)],
            outputs,
            nodes=nodes,
            initializers=[value for value in initializers if id(value) not in fed],
            opset_imports={"": OPSET, **domains},
            name=name,
        )
        functions = [body for key, body in self.functions.items() if any((n.domain, n.op_type) == key for n in nodes)]
        return ir.Model(graph, ir_version=11, producer_name="gemma3c", functions=functions)

    def function(
        self, domain: str, name: str, outputs: Sequence[ir.Value], attributes: Sequence[ir.Attr]
    ) -> ir.Function:
        """What was built so far as a model-local function; its constants become nodes, as a function has no others."""
        nodes, constants = self._live(outputs)
        made = []
        for value in constants:
            assert value.const_value is not None, f"{value.name}: a function reads no weights"
            data = ir.AttrTensor("value", value.const_value)
            made.append(ir.Node("", "Constant", [], [data], outputs=[value], name=value.name))
        graph = ir.Graph(self.inputs, outputs, nodes=[*made, *nodes], opset_imports={"": OPSET}, name=name)
        return ir.Function(domain, name, graph=graph, attributes=attributes)

    def _live(self, outputs: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        needed = {id(value) for value in outputs}
        kept: list[ir.Node] = []
        for node in reversed(self.nodes):
            if any(id(value) in needed for value in node.outputs):
                kept.append(node)
                needed.update(id(value) for value in node.inputs if value is not None)
        pool = [*self.initializers.values(), *(use.value for use in self.weight_uses.values())]
        return kept[::-1], [value for value in pool if id(value) in needed]
