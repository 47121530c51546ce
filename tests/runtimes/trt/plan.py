"""Builds a plan of both plugins with TensorRT for RTX, and prints what it found as JSON: for a process of its own.

    python -m tests.runtimes.trt.plan FOLDER [--kernels HASH] [--batch N] [--without-store]

``FOLDER`` holds ``kernels.json`` of nano; the plan goes to ``FOLDER/plan``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto
from onnx import helper as make

from runtimes.gpu.kernel_file import hash_of
from runtimes.gpu.kernel_store import KernelStore
from runtimes.trt import load, register_plugins, take_failure

CHUNK = 64
ARCHITECTURES = ("SM80", "SM86", "SM89", "SM120")


def graph(kernels: str) -> onnx.ModelProto:
    """One node of each kind, with nano's sizes."""
    bf16, i32, fp32 = TensorProto.BFLOAT16, TensorProto.INT32, TensorProto.FLOAT
    chunk = {"q": [4, 32], "k": [2, 32], "v": [2, 32]}
    inputs = [make.make_tensor_value_info(name, bf16, ["B", "S", *rest]) for name, rest in chunk.items()]
    inputs += [make.make_tensor_value_info(name, bf16, ["B", 2, 16, 32]) for name in ("k_cache", "v_cache")]
    inputs += [make.make_tensor_value_info(name, i32, ["B"]) for name in ("start", "length", "newest")]
    inputs += [make.make_tensor_value_info("visible_end", i32, ["B", "S"])]
    window_inputs = [value.name for value in inputs]
    inputs += [make.make_tensor_value_info("x", bf16, ["N", 16, 48]), make.make_tensor_value_info("norm", fp32, [48])]
    outputs = [make.make_tensor_value_info("out", bf16, ["B", "S", 4, 32])]
    outputs += [make.make_tensor_value_info(name, bf16, ["B", 2, 16, 32]) for name in ("k_cache_out", "v_cache_out")]
    outputs += [make.make_tensor_value_info("y", bf16, ["N", 4, 48])]
    known = {"domain": "gemma3c", "plugin_version": "1", "plugin_namespace": "gemma3c", "kernels": kernels}
    nodes = [
        make.make_node(
            "SlidingWindowAttention", window_inputs, ["out", "k_cache_out", "v_cache_out"],
            name="layers.0.attention", window=16, scale=0.25, **known,
        ),
        make.make_node("SigLIPPool", ["x", "norm"], ["y"], name="pool", pool=2, eps=1e-6, **known),
    ]  # fmt: skip
    opsets = [make.make_opsetid("", 24), make.make_opsetid("gemma3c", 1)]
    return make.make_model(make.make_graph(nodes, "both", inputs, outputs), opset_imports=opsets, ir_version=11)


def build(folder: Path, *, kernels: str, batch: int, store: KernelStore | None) -> dict[str, Any]:
    """Parses, looks at the layers, builds."""
    trt = load("rtx")
    register_plugins(trt, None)
    register_plugins(trt, store)  # a second call changes the kernels
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    found: dict[str, Any] = {"parsed": parser.parse(graph(kernels).SerializeToString())}
    found["errors"] = [parser.get_error(number).desc() for number in range(parser.num_errors)]
    found["layers"] = [_layer(trt, network.get_layer(number)) for number in range(network.num_layers)]
    found["outputs"] = {
        tensor.name: [str(tensor.dtype), list(tensor.shape)]
        for tensor in map(network.get_output, range(network.num_outputs))
    }
    if found["parsed"]:
        plan = builder.build_serialized_network(network, _config(trt, builder, network, batch))
        found["plan"] = None if plan is None else hash_of(bytes(plan))
        if plan is not None:
            (folder / "plan").write_bytes(bytes(plan))
    failure = take_failure()
    found["failure"] = None if failure is None else failure.message
    return found


def _layer(trt: Any, layer: Any) -> dict[str, Any]:
    kind = str(layer.type)
    layer.__class__ = trt.IPluginV3Layer
    plugin = layer.plugin
    fields = {name: getattr(plugin, name) for name in (*plugin.FIELDS, "kernels")}
    aliases = [plugin.get_aliased_input(output) for output in range(layer.num_outputs)]
    return {"name": layer.name, "kind": kind, "plugin": type(plugin).__name__, "fields": fields, "aliases": aliases}


def _config(trt: Any, builder: Any, network: Any, batch: int) -> Any:
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.num_compute_capabilities = len(ARCHITECTURES)
    for number, name in enumerate(ARCHITECTURES):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), number)
    for low, high in ((2, CHUNK), (1, 1)):
        profile = builder.create_optimization_profile()
        for tensor in map(network.get_input, range(network.num_inputs)):
            shapes = [[size if size > 0 else part for size, part in zip(tensor.shape, (few, tokens), strict=False)] + list(tensor.shape)[2:] for few, tokens in ((1, low), (1, high), (batch, high))]  # fmt: skip
            profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)
    return config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kernels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--without-store", action="store_true")
    given = parser.parse_args()
    store = None if given.without_store else KernelStore.open(given.folder)
    kernels = given.kernels if given.kernels is not None else KernelStore.open(given.folder).hash
    json.dump(build(given.folder, kernels=kernels, batch=given.batch, store=store), sys.stdout)


if __name__ == "__main__":
    main()
