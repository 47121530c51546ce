"""A bundle whose graphs have the signature of a real one and arithmetic that fits on a page.

Legend: B batch, S tokens, R rows, V vocabulary, D width, C context, W window, M feature rows.

    x = E[token], or the picture's feature; keys are x and values 2x
    logits[r] = E . (sum over global slots j <= position of r, of (j + 1) v_j  +  sum over local slots of k)

The global cache is linear and the local one a ring, so a wrong position, slot or sequence changes the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtimes.bundle import Bundle
from runtimes.bundle_writer import BundleWriter
from runtimes.manifest import LayerFacts, StageFacts, TensorFacts
from tests.runtimes.manifests import FILES, manifest

V, D, W, CONTEXT = 512, 4, 8, 64
EMBEDDING = (np.arange(V * D).reshape(V, D) % 7 - 3).astype(np.float32) / 4
LAYERS = (
    LayerFacts(kind="local", kv_heads=1, head_dim=D, window=W),
    LayerFacts(kind="global", kv_heads=1, head_dim=D, window=None),
)


def reference(history: list[np.ndarray], row: int) -> np.ndarray:
    """Logits [V] at position ``row`` once all of ``history`` (one x a token) was fed."""
    x = np.stack(history)
    weight = np.arange(1, len(x) + 1, dtype=np.float32)
    total = (2 * x[: row + 1] * weight[: row + 1, None]).sum(0) + x[-W:].sum(0)
    return np.asarray(EMBEDDING @ total)


def decoder(*, image: bool) -> onnx.ModelProto:
    """The graph of ``decoder``, or of ``decoder_image``."""
    int64, float32 = TensorProto.INT64, TensorProto.FLOAT
    inputs = [("token_ids", int64, ["B", "S"]), ("start", int64, ["B"]), ("length", int64, ["B"])]
    inputs.append(("rows", int64, ["B", "R"]))
    caches = [(f"cache.{i}.{part}", float32, ["B", 1, slots, D]) for i, slots in ((0, W), (1, "C")) for part in "kv"]
    inputs += caches
    if image:
        inputs += [
            ("features", float32, ["M", D]),
            ("feature_rows", int64, ["B", "S"]),
            ("image_ids", int64, ["B", "S"]),
        ]
    nodes = [helper.make_node("Gather", ["E", "token_ids"], ["text"])]
    if image:
        nodes += [
            helper.make_node("Max", ["feature_rows", "zero"], ["row"]),
            helper.make_node("Gather", ["features", "row"], ["shown"]),
            helper.make_node("GreaterOrEqual", ["feature_rows", "zero"], ["is_image2"]),
            helper.make_node("Unsqueeze", ["is_image2", "last"], ["is_image"]),
            helper.make_node("Where", ["is_image", "shown", "text"], ["x"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["text"], ["x"]))
    nodes += [
        helper.make_node("Unsqueeze", ["x", "one"], ["k"]),
        helper.make_node("Add", ["k", "k"], ["v"]),
        helper.make_node("Greater", ["length", "zero"], ["live1"]),
        helper.make_node("Reshape", ["live1", "B111"], ["live"]),
    ]
    for index, mode in ((0, "circular"), (1, "linear")):
        for part in "kv":
            name = f"cache.{index}.{part}"
            scattered = helper.make_node("TensorScatter", [name, part, "start"], [f"{name}.new"], mode=mode, axis=2)
            kept = helper.make_node("Where", ["live", f"{name}.new", name], [f"{name}.out"])
            nodes += [scattered, kept]
    nodes += [
        helper.make_node("Unsqueeze", ["start", "one"], ["start1"]),
        helper.make_node("Add", ["start1", "rows"], ["position"]),
        helper.make_node("Unsqueeze", ["position", "last"], ["position1"]),
        helper.make_node("Shape", ["cache.1.k"], ["size"], start=2, end=3),
        helper.make_node("Squeeze", ["size"], ["C"]),
        helper.make_node("Range", ["zero0", "C", "one0"], ["slot"]),
        helper.make_node("LessOrEqual", ["slot", "position1"], ["visible"]),
        helper.make_node("Add", ["slot", "one0"], ["slot1"]),
        helper.make_node("Where", ["visible", "slot1", "zero0"], ["weight0"]),
        helper.make_node("Cast", ["weight0"], ["weight"], to=float32),
        helper.make_node("Squeeze", ["cache.1.v.out", "one"], ["values"]),
        helper.make_node("MatMul", ["weight", "values"], ["seen"]),
        helper.make_node("ReduceSum", ["cache.0.k.out", "two"], ["near"], keepdims=0),
        helper.make_node("Add", ["seen", "near"], ["total"]),
        helper.make_node("MatMul", ["total", "ET"], ["logits"]),
    ]
    constants: dict[str, Any] = {
        "E": EMBEDDING, "ET": EMBEDDING.T.copy(), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2]),
        "last": np.array([2]), "B111": np.array([-1, 1, 1, 1]), "zero0": np.array(0), "one0": np.array(1),
    }  # fmt: skip
    outputs = [("logits", float32, ["B", "R", V]), *[(f"{n}.out", t, s) for n, t, s in caches]]
    return _model(nodes, inputs, outputs, constants)


def vision() -> onnx.ModelProto:
    """[N, 3, 8, 8] to [N, 4, D]: the mean of each quarter of the picture, times the width's index + 1."""
    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("ReduceMean", ["pooled", "one"], ["gray"], keepdims=0),
        helper.make_node("Reshape", ["gray", "N41"], ["quarter"]),
        helper.make_node("Mul", ["quarter", "scale"], ["features"]),
    ]
    constants = {"one": np.array([1]), "N41": np.array([-1, 4, 1]), "scale": np.arange(1, D + 1, dtype=np.float32)}
    inputs = [("pixels", TensorProto.FLOAT, ["N", 3, 8, 8])]
    return _model(nodes, inputs, [("features", TensorProto.FLOAT, ["N", 4, D])], constants)


def write_bundle(dest: Path, *, broken: bool = False, **changes: Any) -> Bundle:
    """The bundle on disk; ``changes`` replace the manifest's fields, ``broken`` damages the decoder."""
    graphs = {"decoder": decoder(image=False), "decoder_image": decoder(image=True), "vision": vision()}
    whole = manifest()
    model = type(whole.model)(**{**whole.model.__dict__, "layers": LAYERS, "max_context": CONTEXT, "hidden_size": D})
    signature = TensorFacts(name="token_ids", dtype="int64", shape=("B", "S"))
    stages = {name: StageFacts(graph=f"{name}.onnx", inputs=(signature,), outputs=(signature,)) for name in graphs}
    fields: dict[str, Any] = {"model": model, "stages": stages, "settings": {}, "probes": {}, **changes}
    with BundleWriter(dest) as writer:
        for name, data in FILES.items():
            writer.path(name).write_bytes(data)
        for name, graph in graphs.items():
            data = graph.SerializeToString()
            writer.path(f"{name}.onnx").write_bytes(data[:50] if broken and name == "decoder" else data)
        return writer.finish(manifest(**fields))


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any]) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    declared = [[helper.make_tensor_value_info(*one) for one in part] for part in (inputs, outputs)]
    graph = helper.make_graph(nodes, "toy", declared[0], declared[1], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    return model
