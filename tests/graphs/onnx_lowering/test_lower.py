"""Whole stages: their files, their probes, quantised weights of every kind, and building without weights in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from gemma3_compile.config import ModelConfig
from gemma3_compile.model import Gemma3
from graphs.onnx_lowering.builder import OPSET, Builder
from graphs.onnx_lowering.context import OrtOptions
from graphs.onnx_lowering.lower import LoweredStage, lower_for_ort
from graphs.weights import BlockFormat
from tests.graphs.decoders import EagerDecoder, OrtDecoder, compare, image_chunk, text_chunk
from tests.graphs.nano import STAGES, eager_outputs, linear_names, nano_program, nano_stage, stage_inputs
from tests.graphs.ort import WEIGHTS, Stored, dequantized, open_graph, random_blocks, run, save
from tests.tolerances import check

LAYERS = {"decoder": 6, "decoder_image": 6, "vision": 2}
KINDS = {
    "embed_tokens": BlockFormat(bits=8, block_size=16, zero_points="none"),
    "q_proj": BlockFormat(bits=4, block_size=32, zero_points="minimum"),
    "k_proj": BlockFormat(bits=4, block_size=32, zero_points="minimum"),
    "v_proj": BlockFormat(bits=8, block_size=16, zero_points="none"),
    "o_proj": BlockFormat(bits=4, block_size=32, zero_points="none"),
    "gate_proj": BlockFormat(bits=4, block_size=32, zero_points="integer"),
    "up_proj": BlockFormat(bits=4, block_size=32, zero_points="integer"),
    "down_proj": BlockFormat(bits=8, block_size=32, zero_points="none"),
}
"""A format for each kind of weight, as mixed as a kept checkpoint's."""
TOWER = BlockFormat(bits=8, block_size=32, zero_points="none")


@pytest.fixture(scope="module")
def folder(lowered: Mapping[str, LoweredStage], nano_model: Gemma3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 stages on disk."""
    path = tmp_path_factory.mktemp("files")
    save(path, lowered.values(), Stored(plain=nano_model.state_dict()))
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_holds_no_weights(folder: Path, stage: str) -> None:
    """Constants only: every weight is a range of the weights file, inside it and as long as its dimensions say."""
    model = onnx.load(folder / f"{stage}.onnx", load_external_data=False)
    size = (folder / WEIGHTS).stat().st_size
    external = [x for x in model.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]
    assert external
    for tensor in external:
        where = {entry.key: entry.value for entry in tensor.external_data}
        assert where["location"] == WEIGHTS
        begin, length = int(where["offset"]), int(where["length"])
        assert begin > 0 and begin + length <= size
        assert length == int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    inside = [x for x in model.graph.initializer if x.data_location != onnx.TensorProto.EXTERNAL]
    assert sum(len(x.raw_data) for x in inside) < 4096


@pytest.mark.parametrize("stage", STAGES)
def test_onnx_accepts_the_file(folder: Path, stage: str) -> None:
    onnx.checker.check_model(str(folder / f"{stage}.onnx"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_signature_is_the_contract(folder: Path, stage: str) -> None:
    """Names, dtypes and dimensions, static or symbolic, in the contract's order."""
    model = ir.load(folder / f"{stage}.onnx")
    assert model.graph.opset_imports[""] == OPSET

    def signature(values: object) -> list[tuple[object, ...]]:
        return [
            (v.name, v.dtype.numpy().name, tuple(d if isinstance(d, int) else d.value for d in v.shape)) for v in values
        ]

    contract = nano_stage(stage)
    assert signature(model.graph.inputs) == [(s.name, s.dtype, s.shape) for s in contract.inputs]
    assert signature(model.graph.outputs) == [(s.name, s.dtype, s.shape) for s in contract.outputs]


def test_the_stages_share_their_weights(lowered: Mapping[str, LoweredStage]) -> None:
    text, image = (set(lowered[name].stored) for name in ("decoder", "decoder_image"))
    assert text == image


def test_the_tied_embedding_is_one_initializer(lowered: Mapping[str, LoweredStage]) -> None:
    """Lookup and head read it as it stands: nothing that a constant folder could copy."""
    (use,) = (u for u in lowered["decoder"].weight_uses if u.entry.name == "decoder.embed_tokens.weight")
    assert sorted(node.op_type for node in use.value.consumers()) == ["FusedMatMul", "Gather"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_probe_for_each_layer_can_be_asked_for(
    folder: Path, lowered: Mapping[str, LoweredStage], nano_model: Gemma3, stage: str
) -> None:
    """As validation does it: the value becomes an output of the graph, and holds the residual stream."""
    probes = lowered[stage].probes
    assert list(probes) == [f"layers.{i}" for i in range(LAYERS[stage])]
    model = onnx.load(folder / f"{stage}.onnx", load_external_data=False)
    for name in probes.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    path = folder / f"{stage}.probed.onnx"
    onnx.save(model, path)
    seen: list[torch.Tensor] = []
    part = nano_model.vision if stage == "vision" else nano_model.decoder
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in part.layers
    ]
    inputs = stage_inputs(stage)
    if stage != "vision":  # the two sides keep local caches in their own ways, so both begin with none
        inputs |= {"start": torch.tensor([0, 0, 0]), "length": torch.tensor([7, 7, 7])}
    try:
        eager_outputs(nano_model, stage, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = run(open_graph(path), inputs)
    if "rows" in inputs:  # the last layer goes on with the rows that are asked for
        seen[-1] = torch.stack([one[rows] for one, rows in zip(seen[-1], inputs["rows"], strict=True)])
    for index, expected in enumerate(seen):
        check("ort.logits", outputs[probes[f"layers.{index}"]], expected, f"{stage}: layer {index}")


def quantised(model: Gemma3, formats: Mapping[str, BlockFormat]) -> tuple[Gemma3, Stored]:
    """The model whose weights are what random blocks mean, and those blocks."""
    state = model.state_dict()
    blocks = {name: random_blocks(*state[name].shape, form, seed=i) for i, (name, form) in enumerate(formats.items())}
    plain = {**state, **{name: dequantized(blocks[name], form) for name, form in formats.items()}}
    changed = Gemma3(model.config).eval().requires_grad_(False)
    changed.load_state_dict(plain)
    return changed, Stored(plain=plain, blocks=blocks)


def decoder_formats(config: ModelConfig) -> dict[str, BlockFormat]:
    names = ["decoder.embed_tokens.weight", *(n for n in linear_names(config) if n.startswith("decoder."))]
    return {name: KINDS[name.split(".")[-2]] for name in names}


def test_a_decoder_of_mixed_formats(nano_model: Gemma3, tmp_path: Path) -> None:
    """Text and images; int16 activations lose little, so the masks and caches must be right."""
    formats = decoder_formats(nano_model.config)
    model, stored = quantised(nano_model, formats)
    options = OrtOptions(activations="int16")
    stages = [lower_for_ort(nano_program(name, formats), options) for name in ("decoder", "decoder_image")]
    graphs = {name: open_graph(path) for name, path in save(tmp_path, stages, stored).items()}
    chunks = [text_chunk([14], seed=1), image_chunk(9, [4], seed=2), *(text_chunk([1], seed=i) for i in range(3))]
    compare("ort.quantised_logits", EagerDecoder(model, 1, 48), OrtDecoder(graphs, 1, 48), chunks)
    ragged = [text_chunk(lengths, seed=sum(lengths)) for lengths in ([9, 0, 20], [1, 3, 0], [1, 1, 1])]
    compare("ort.quantised_logits", EagerDecoder(model, 3, 48), OrtDecoder(graphs, 3, 48), ragged)


def test_a_quantised_vision_tower(nano_model: Gemma3, tmp_path: Path) -> None:
    """48 columns: the last block of a row is not full. Biases stay as they are."""
    formats = {name: TOWER for name in linear_names(nano_model.config) if name.startswith("vision.")}
    model, stored = quantised(nano_model, formats)
    stage = lower_for_ort(nano_program("vision", formats), OrtOptions(activations="int16"))
    graph = open_graph(save(tmp_path, [stage], stored)["vision"])
    inputs = stage_inputs("vision")
    expected = eager_outputs(model, "vision", inputs)["features"]
    check("ort.quantised_logits", run(graph, inputs)["features"], expected)


def test_equal_constants_are_stored_once() -> None:
    builder = Builder()
    frequencies = np.linspace(0, 1, 40, dtype=np.float32)
    first = builder.constant(frequencies, "float32")
    assert builder.constant(frequencies.copy(), "float32") is first
    assert builder.constant(frequencies + 1, "float32") is not first
    assert builder.constant(1, "int64") is builder.constant(1, "int64")
    others = [builder.constant(*c) for c in ((1, "float32"), ([1], "int64"), ([[1]], "int64"), (-1, "int64"))]
    assert len({id(value) for value in [*others, builder.constant(1, "int64")]}) == 5


def test_what_nothing_uses_is_left_out() -> None:
    builder = Builder()
    x = builder.input("x", "float32", ("B",))
    builder.scope("dead")
    builder.op("Neg", [builder.op("Exp", [x])])
    builder.constant(7, "int64")
    builder.scope("live")
    model = builder.model("g", [builder.op("Abs", [x])])
    assert [node.op_type for node in model.graph] == ["Abs"] and not model.graph.initializers


WIDE = """
from dataclasses import replace
from gemma3_compile.presets import preset
from gemma3_compile.stage_graphs import compile_for_ort
from graphs.onnx_lowering.context import OrtOptions
from graphs.weights import WeightsPlan
from runtimes.peak_memory import peak_rss_bytes

before = peak_rss_bytes()
whole = preset("27b")
text = replace(whole.text, num_layers=2, layer_kinds=("local", "global"))
vision = replace(whole.vision, num_layers=1)
stages = compile_for_ort(replace(whole, name="custom", text=text, vision=vision), {}, OrtOptions())
plan = WeightsPlan.merge(stage.lowered.stored for stage in stages)
after = peak_rss_bytes()
print(before, after, plan.size_bytes)
"""


def test_compiling_holds_no_weights() -> None:
    """Two layers as wide as 27b's, 8 GB of weights, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, check=True)
    before, after, weights = map(int, done.stdout.split())
    assert weights > 7e9
    assert after < 1.2e9 and after - before < 0.5e9, f"{before / 1e9:.2f} GB grew to {after / 1e9:.2f} GB"
