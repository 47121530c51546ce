"""Parses every graph of a folder with TensorRT for RTX, plugins registered, and builds those named ``build_*``.

    python -m tests.graphs.onnx_lowering.trt_worker FOLDER        -> JSON by file name, on the last line of stdout

A process of its own, as TensorRT may end the one that it is in.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from runtimes.trt import load, register_plugins

TOKENS = (1, 8, 64)
"""Smallest, usual and largest size of a dynamic dimension."""


def parsed(trt: Any, builder: Any, path: Path) -> tuple[dict[str, Any], Any]:
    """What the parser made of a graph."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parser.parse_from_file(str(path))
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    report: dict[str, Any] = {
        "errors": errors,
        "kinds": Counter(str(layer.type).removeprefix("LayerType.") for layer in layers),
        "plugins": [plugin_of(trt, layer) for layer in layers if layer.type == trt.LayerType.PLUGIN_V3],
        "inputs": signature(network.get_input(index) for index in range(network.num_inputs)),
        "outputs": signature(network.get_output(index) for index in range(network.num_outputs)),
        "tensors": [layer.get_output(index).name for layer in layers for index in range(layer.num_outputs)],
    }
    return report, network


def signature(tensors: Any) -> dict[str, tuple[str, list[int]]]:
    return {tensor.name: (str(tensor.dtype).removeprefix("DataType."), list(tensor.shape)) for tensor in tensors}


def plugin_of(trt: Any, layer: Any) -> dict[str, Any]:
    layer.__class__ = trt.IPluginV3Layer
    names = ("window", "scale", "pool", "eps", "kernels")
    fields = {name: getattr(layer.plugin, name) for name in names if hasattr(layer.plugin, name)}
    return {"plugin": type(layer.plugin).__name__, **fields}


def kernels_of(trt: Any, builder: Any, network: Any) -> list[tuple[str, str]]:
    """Each kernel of a plan for sm_80 with what it reads, from the text that a plan for RTX holds."""
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *([n if d == -1 else d for d in tensor.shape] for n in TOKENS))
    config.add_optimization_profile(profile)
    plan = bytes(builder.build_serialized_network(network, config))
    call = rb"\n  (function|runtime_fusion|fully_connected)=\{ name=\"?([^\s\"]+)\"?.*?input(?:_args)?=\{([^}]*)\}"
    return [(kind.decode() + " " + name.decode(), reads.decode()) for kind, name, reads in re.findall(call, plan)]


def main(folder: Path) -> None:
    trt = load("rtx")
    register_plugins(trt, None)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    reports = {}
    for path in sorted(folder.glob("*.onnx")):
        report, network = parsed(trt, builder, path)
        if path.name.startswith("build_") and not report["errors"]:
            report["kernels"] = kernels_of(trt, builder, network)
        reports[path.stem] = report
    sys.stdout.write(json.dumps(reports) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
