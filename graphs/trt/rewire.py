"""What TensorRT's ONNX parser makes of an Attention, put right in the network that it leaves.

The parser multiplies queries and keys by the root of the scale each. Ours is 1, as queries are scaled beforehand, but the
product stays in the plan, where it copies a whole cache of keys for every token. And the parser drops ONNX's
``nonpad_kv_seqlen``, without which all slots of a cache are read, not only those that are filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from runtimes.errors import ExportError

FILLED = "chunk.filled"
"""The tensor that says how many slots of a linear cache are filled: int32 [B]."""
_QUERIES_AND_KEYS = (0, 1)


def rewire(trt: ModuleType, network: Any) -> int:
    """Takes the products with 1 away from each attention, and gives it the lengths of its cache where it has one.

    Returns how many attentions there are.

    Raises:
        ExportError: the parser has built something else than what this knows.
    """
    producers = {tensor.name: layer for layer, tensor in _outputs(network)}
    filled = next((tensor for _, tensor in _outputs(network) if tensor.name == FILLED), None)
    count = 0
    for layer in _layers(network):
        if layer.type != trt.LayerType.ATTENTION_INPUT:
            continue
        count += 1
        layer.__class__ = trt.IAttentionInputLayer  # `get_layer` gives the base class, which has no `attention`
        attention = layer.attention
        for index in _QUERIES_AND_KEYS:
            _unscale(trt, producers, attention, index, layer.name)
        keys = producers.get(attention.get_input(1).name)
        if keys is not None and keys.type == trt.LayerType.KV_CACHE_UPDATE:
            if filled is None:
                raise ExportError(f"{layer.name} reads a cache, but the network has no tensor `{FILLED}`")
            attention.key_value_lengths = filled
    return count


def _unscale(trt: ModuleType, producers: dict[str, Any], attention: Any, index: int, name: str) -> None:
    """Makes an input of an attention the factor that its product with 1 has beside the 1."""
    product = producers.get(attention.get_input(index).name)
    if product is None or product.type != trt.LayerType.ELEMENTWISE:
        return
    product.__class__ = trt.IElementWiseLayer
    if product.op != trt.ElementWiseOperation.PROD:
        return
    scale = _constant(trt, producers, product.get_input(1))
    if scale is None:
        return  # the graph's own product, not the parser's
    if scale.size != 1 or float(scale.item()) != 1.0:
        raise ExportError(f"{name}: an attention's scale must be 1 for TensorRT, but the parser multiplies by {scale}")
    if not attention.set_input(index, product.get_input(0)):
        raise ExportError(f"{name}: TensorRT does not take {product.get_input(0).name} as input {index}")


def _constant(trt: ModuleType, producers: dict[str, Any], tensor: Any) -> np.ndarray[Any, np.dtype[Any]] | None:
    """The constant behind a tensor, through the cast that the parser adds; None where it is computed."""
    layer = producers.get(tensor.name)
    while layer is not None and layer.type == trt.LayerType.CAST:
        layer = producers.get(layer.get_input(0).name)
    if layer is None or layer.type != trt.LayerType.CONSTANT:
        return None
    layer.__class__ = trt.IConstantLayer
    return np.asarray(layer.weights)


def _layers(network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _outputs(network: Any) -> Iterator[tuple[Any, Any]]:
    for layer in _layers(network):
        for index in range(layer.num_outputs):
            yield layer, layer.get_output(index)
