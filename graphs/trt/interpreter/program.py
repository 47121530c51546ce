"""A parsed network as plain data: every layer with all its attributes, in an order in which it can be computed.

TensorRT gives out a layer as its base class; only after ``layer.__class__`` is set to the class of its type does it show
what it has. All of that is read here, once. TensorRT's objects live on beside it (constants point into them).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from graphs.trt.interpreter.rule import InterpreterError, Layer, TensorFacts
from graphs.trt.interpreter.rules import RULES
from graphs.trt.network import ParsedNetwork


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """See the module.

    Args:
        layers: each after those whose outputs it reads. Layers that no output needs are left out.
        dropped: for each layer, the tensors that nothing after it reads.
        parsed: keeps TensorRT's objects alive.
    """

    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    layers: tuple[Layer, ...]
    dropped: tuple[tuple[str, ...], ...]
    parsed: ParsedNetwork

    @classmethod
    def read(cls, parsed: ParsedNetwork) -> Program:
        """Reads a network.

        Raises:
            InterpreterError: a layer is of a kind, or has an attribute, that the interpreter does not know; the layers
                go round in a circle.
        """
        trt, network = parsed.trt, parsed.network
        inputs = tuple(_tensor(network.get_input(index)) for index in range(network.num_inputs))
        outputs = tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs))
        read = [_layer(trt, network.get_layer(index)) for index in range(network.num_layers)]
        layers = _ordered(read, inputs, outputs)
        return cls(inputs=inputs, outputs=outputs, layers=layers, dropped=_dropped(layers, outputs), parsed=parsed)

    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers that occur, sorted."""
        return tuple(sorted({layer.kind for layer in self.layers}))


def _tensor(tensor: Any) -> TensorFacts:
    return TensorFacts(name=tensor.name, dtype=tensor.dtype.name, shape=tuple(tensor.shape))


def _layer(trt: ModuleType, layer: Any) -> Layer:
    kind = layer.type.name  # before the class is set: an activation's `type` is another then
    rule = RULES.get(kind)
    if rule is None:
        raise InterpreterError(f"the layer `{layer.name}` is of the kind {kind}, which the interpreter does not know")
    inputs = tuple(layer.get_input(index) for index in range(layer.num_inputs))
    facts = tuple(None if tensor is None else _tensor(tensor) for tensor in inputs)
    outputs = tuple(_tensor(layer.get_output(index)) for index in range(layer.num_outputs))
    layer.__class__ = getattr(trt, rule.interface)
    read = Layer(kind=kind, name=layer.name, inputs=facts, outputs=outputs, attributes={})
    unknown = _own_attributes(trt, rule.interface) - set(rule.attributes)
    if unknown:
        raise read.refuse(f"it has attributes that the interpreter does not know: {', '.join(sorted(unknown))}")
    attributes = {name: _plain(trt, _get(layer, name)) for name in rule.attributes}
    return Layer(kind=kind, name=layer.name, inputs=facts, outputs=outputs, attributes=attributes)


@cache
def _own_attributes(trt: ModuleType, interface: str) -> frozenset[str]:
    """Properties of a class of layers that not every layer has."""
    return frozenset(_properties(getattr(trt, interface))) - frozenset(dir(trt.ILayer))


def _get(layer: Any, name: str) -> Any:
    """An attribute; None where TensorRT says that it is not set."""
    try:
        return getattr(layer, name)
    except RuntimeError:
        return None


def _plain(trt: ModuleType, value: Any) -> Any:
    """A value without TensorRT's types, but for weights and plugins."""
    if isinstance(value, trt.ITensor):
        return value.name
    if isinstance(value, trt.IAttention):
        return _attention(trt, value)
    if isinstance(value, trt.Dims | trt.Permutation):
        return tuple(value)
    name = getattr(value, "name", None)
    if isinstance(value, enum.Enum) or (isinstance(name, str) and hasattr(type(value), "__members__")):
        return name
    return value


def _attention(trt: ModuleType, attention: Any) -> dict[str, Any]:
    """What is between two boundaries. TensorRT takes it for an error to ask for a type of quantisation that is not set."""
    names = set(_properties(type(attention)))
    if attention.normalization_quantize_scale is None:
        names.discard("normalization_quantize_to_type")
    return {name: _plain(trt, _get(attention, name)) for name in sorted(names)}


def _properties(interface: type) -> tuple[str, ...]:
    return tuple(name for name in dir(interface) if isinstance(getattr(interface, name), property))


def _reads(layer: Layer) -> Iterator[str]:
    """Names of the tensors that a layer reads."""
    for tensor in layer.inputs:
        if tensor is not None:
            yield tensor.name


def _ordered(read: Sequence[Layer], inputs: Sequence[TensorFacts], outputs: Sequence[TensorFacts]) -> tuple[Layer, ...]:
    """The layers that the outputs need, each after its inputs. TensorRT's own order is not always one that runs."""
    producers: dict[str, Layer] = {}
    for layer in read:
        for tensor in layer.outputs:
            if tensor.name in producers:
                raise layer.refuse(f"two tensors have the name `{tensor.name}`")
            producers[tensor.name] = layer
    given = {tensor.name for tensor in inputs}
    done: dict[int, Layer] = {}
    opened: set[int] = set()
    stack = [producers[tensor.name] for tensor in reversed(outputs) if tensor.name in producers]
    while stack:
        layer = stack[-1]
        waiting = [producers[name] for name in _reads(layer) if name not in given and id(producers[name]) not in done]
        if id(layer) in done or not waiting:
            done.setdefault(id(layer), layer)
            stack.pop()
            continue
        if id(layer) in opened:
            raise layer.refuse("it waits for itself")
        opened.add(id(layer))
        stack += waiting
    return tuple(done.values())


def _dropped(layers: Sequence[Layer], outputs: Iterable[TensorFacts]) -> tuple[tuple[str, ...], ...]:
    last: dict[str, int] = {}
    for index, layer in enumerate(layers):
        last |= dict.fromkeys((*_reads(layer), *(tensor.name for tensor in layer.outputs)), index)
    kept = {tensor.name for tensor in outputs}
    dropped: list[list[str]] = [[] for _ in layers]
    for name, index in last.items():
        if name not in kept:
            dropped[index].append(name)
    return tuple(tuple(names) for names in dropped)
