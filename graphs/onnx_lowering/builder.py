"""Builds one ONNX graph: nodes in order, small constants once, weights by reference.

A weight's initializer has a name, a dtype and dimensions, but no data: ``bind_weights`` points it
into the bundle's safetensors file when the layout of that file is known.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphs.weights import StoredTensor
from runtimes.errors import ExportError

OPSET = 24
MICROSOFT = "com.microsoft"
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
}


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """An initializer that reads ``entry`` of the weights file, seen with dimensions ``shape``."""

    value: ir.Value
    entry: StoredTensor
    shape: tuple[int, ...]


class Builder:
    """Collects the nodes of a graph; rules call ``op``, ``constant`` and ``weight``."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: dict[str, ir.Value] = {}
        self.weight_uses: dict[str, WeightUse] = {}
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

    def weight(self, entry: StoredTensor, shape: Sequence[int] | None = None) -> ir.Value:
        """An initializer over ``entry``; ``shape`` sees the same bytes with other dimensions.

        Raises:
            ExportError: another tensor of this graph has the name of ``entry``.
        """
        dims = tuple(shape) if shape is not None else entry.shape
        name = entry.name if dims == entry.shape else f"{entry.name}@{'x'.join(map(str, dims))}"
        if name not in self.weight_uses:
            value = ir.Value(name=name, type=ir.TensorType(DTYPES[entry.dtype]), shape=ir.Shape(dims))
            self.weight_uses[name] = WeightUse(value=value, entry=entry, shape=dims)
        use = self.weight_uses[name]
        if use.entry != entry:
            raise ExportError(f"the graph wants two different tensors named `{entry.name}`: {use.entry} and {entry}")
        return use.value

    def model(self, name: str, outputs: Sequence[ir.Value]) -> ir.Model:
        """The finished graph, with nodes that nothing uses left out."""
        nodes, initializers = self._live(outputs)
        graph = ir.Graph(
            self.inputs,
            outputs,
            nodes=nodes,
            initializers=initializers,
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=name,
        )
        return ir.Model(graph, ir_version=11, producer_name="gemma3c")

    def _live(self, outputs: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        needed = {id(value) for value in outputs}
        kept: list[ir.Node] = []
        for node in reversed(self.nodes):
            if any(id(value) in needed for value in node.outputs):
                kept.append(node)
                needed.update(id(value) for value in node.inputs if value is not None)
        pool = [*self.initializers.values(), *(use.value for use in self.weight_uses.values())]
        return kept[::-1], [value for value in pool if id(value) in needed]
