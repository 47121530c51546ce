"""From an ONNX file to TensorRT's network, and what that network holds. Needs no torch and no GPU.

Plugins are registered beforehand (:func:`runtimes.trt.register_plugins`): the parser takes them for the nodes that carry
their name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from graphs.trt.profiles import Profile, dims_of
from graphs.trt.report import NetworkReport, PluginReport, TensorReport
from graphs.trt.rewire import rewire
from runtimes.errors import ExportError

_DTYPES: Mapping[str, str] = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "INT8": "int8",
    "UINT8": "uint8", "BOOL": "bool", "INT4": "int4", "FP8": "float8_e4m3fn",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NodeError:
    """What the parser says of one node; ``node`` and ``op`` are empty where it names none."""

    node: str
    op: str
    message: str


class ParseError(ExportError):
    """TensorRT's parser refused a graph."""

    def __init__(self, file: str, errors: Sequence[NodeError]) -> None:
        first = errors[0] if errors else NodeError(node="", op="", message="it gives no reason")
        where = f" at the node `{first.node}` ({first.op})" if first.node or first.op else ""
        more = f" (the first of {len(errors)} errors)" if len(errors) > 1 else ""
        super().__init__(f"TensorRT does not parse {file}{where}: {first.message}{more}")
        self.file = file
        self.errors = tuple(errors)


@dataclass(frozen=True, kw_only=True)
class ParsedNetwork:
    """TensorRT's objects, which live only as long as those that they came from."""

    trt: ModuleType
    logger: Any
    builder: Any
    network: Any
    parser: Any


def parse(trt: ModuleType, onnx: Path, *, logger: Any = None) -> ParsedNetwork:
    """Reads ``onnx`` and the weights that it points to, and puts right what the parser makes of attention.

    Args:
        logger: None prints warnings and errors.

    Raises:
        ParseError: TensorRT knows an operator not, or not in this form.
    """
    logger = trt.Logger(trt.Logger.WARNING) if logger is None else logger
    builder = trt.Builder(logger)
    # Every network of TensorRT 11 and of RTX is strongly typed; older ones of the full flavour have to be told.
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strong is None else 1 << int(strong))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise ParseError(onnx.name, [_node_error(error) for error in errors])
    rewire(trt, network)
    return ParsedNetwork(trt=trt, logger=logger, builder=builder, network=network, parser=parser)


def add_profiles(parsed: ParsedNetwork, config: Any, profiles: Sequence[Profile]) -> None:
    """Adds one profile after the other to a builder's configuration; inputs without a varying dimension need none.

    Raises:
        ExportError: TensorRT refuses one.
    """
    for number, profile in enumerate(profiles):
        made = parsed.builder.create_optimization_profile()
        for tensor in _inputs(parsed.network):
            shape = _shape(tensor)
            if any(isinstance(dim, str) for dim in shape):
                made.set_shape(tensor.name, *dims_of(shape, profile))
        if config.add_optimization_profile(made) != number:
            raise ExportError(f"TensorRT refuses the sizes of profile {number}: {dict(profile)}")


def describe(parsed: ParsedNetwork) -> NetworkReport:
    """Counts and names what is in a network."""
    network, trt = parsed.network, parsed.trt
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = Counter(layer.type.name for layer in layers)
    plugins = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    return NetworkReport(
        layers=dict(sorted(kinds.items())),
        plugins=tuple(_plugin(trt, layer) for layer in plugins),
        inputs=tuple(_tensor(tensor) for tensor in _inputs(network)),
        outputs=tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs)),
    )


def _node_error(error: Any) -> NodeError:
    return NodeError(node=error.node_name(), op=error.node_operator(), message=" ".join(error.desc().split()))


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(i) for i in range(network.num_inputs)]


def _shape(tensor: Any) -> tuple[int | str, ...]:
    return tuple(tensor.get_dimension_name(i) or "?" if dim < 0 else dim for i, dim in enumerate(tensor.shape))


def _tensor(tensor: Any) -> TensorReport:
    return TensorReport(name=tensor.name, dtype=_DTYPES[tensor.dtype.name], shape=_shape(tensor))


def _plugin(trt: ModuleType, layer: Any) -> PluginReport:
    layer.__class__ = trt.IPluginV3Layer  # `get_layer` gives the base class, which has no `plugin`
    plugin = layer.plugin
    fields = {name: getattr(plugin, name) for name in (*plugin.FIELDS, "kernels")}
    sources = {output: plugin.get_aliased_input(output) for output in range(layer.num_outputs)}
    return PluginReport(
        layer=layer.name,
        plugin=f"{plugin.plugin_namespace}::{plugin.plugin_name}",
        fields=fields,
        aliases={layer.get_output(o).name: layer.get_input(i).name for o, i in sources.items() if i >= 0},
    )
