"""The ``trt`` dialect's graphs as files: operators, plugin nodes, inputs, references to weights, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import Tensor, nn

from autotune.kernels.prefill_attention import visible_ends_BS
from gemma3_compile.formats import EMBEDDING, INT4, TRT_FP8, TRT_INT4, TRT_INT8, trt_formats
from gemma3_compile.model import Gemma3
from gemma3_compile.presets import preset
from gemma3_compile.stage_graphs import compile_for_trt, trt_stages_of
from graphs.node_args import tensor_value
from graphs.onnx_lowering.builder import DTYPES, OPSET
from graphs.onnx_lowering.context import TrtOptions
from graphs.onnx_lowering.lower import LoweredStage, bind_weights, lower_for_trt, weight_inputs
from graphs.ops import gemma3c
from graphs.weights import BlockFormat, WeightsPlan
from graphs.weights_file import WeightsLayout
from runtimes.errors import ExportError, UsageError
from tests.graphs.decoders import EagerDecoder, compare, image_chunk, text_chunk
from tests.graphs.nano import linear_names
from tests.graphs.onnx_lowering.test_trt_decoder import plain
from tests.graphs.small import small_program
from tests.graphs.trt_nano import (
    CONTEXT,
    STAGES,
    TrtDecoder,
    lowered_trt,
    open_trt,
    trt_program,
    trt_stage,
    with_weights,
)

HASH = "7" * 64
PLUGINS = {"decoder": ("SlidingWindowAttention", 5), "vision": ("SigLIPPool", 1)}


@pytest.fixture(scope="module")
def lowered() -> dict[str, LoweredStage]:
    """Shared: do not write to it."""
    return {name: lowered_trt(name, TrtOptions(context=CONTEXT, kernels_hash=HASH)) for name in STAGES}


def proto(stage: LoweredStage) -> ModelProto:
    return ir.to_proto(stage.model)


@pytest.mark.parametrize("stage", STAGES)
def test_operators_are_onnx_own_but_for_the_plugins(lowered: dict[str, LoweredStage], stage: str) -> None:
    model = proto(lowered[stage])
    assert {x.domain: x.version for x in model.opset_import} == {"": OPSET, "gemma3c": 1}
    foreign = Counter(node.op_type for node in model.graph.node if node.domain)
    assert foreign == {PLUGINS[stage][0]: PLUGINS[stage][1]}
    inner = [node for function in model.functions for node in function.node]
    assert inner and {node.domain for node in inner} == {""}
    used = {node.op_type for node in (*model.graph.node, *inner)}
    assert not used & {"RMSNormalization", "Conv", "Gemm", "LayerNorm"}, "they are written out"


@pytest.mark.parametrize("stage", STAGES)
def test_onnx_accepts_the_file(lowered: dict[str, LoweredStage], stage: str) -> None:
    onnx.checker.check_model(proto(lowered[stage]))


@pytest.mark.parametrize("stage", STAGES)
def test_plugin_nodes_say_all_that_the_plugin_and_the_parser_must_know(
    lowered: dict[str, LoweredStage], stage: str
) -> None:
    model = proto(lowered[stage])
    numbers = {"decoder": {"window": 16, "scale": 32**-0.5}, "vision": {"pool": 2, "eps": 1e-6}}[stage]
    text = {"plugin_version": b"1", "plugin_namespace": b"gemma3c", "kernels": HASH.encode()}
    counts = {"decoder": (9, 3), "vision": (2, 1)}[stage]
    for node in (node for node in model.graph.node if node.domain):
        assert (len(node.input), len(node.output)) == counts and all(node.input)
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert found == {**{name: pytest.approx(value) for name, value in numbers.items()}, **text}
    (function,) = model.functions
    assert (function.domain, function.name) == ("gemma3c", PLUGINS[stage][0])
    assert (len(function.input), len(function.output)) == counts
    assert {a.name for a in function.attribute_proto} == {*numbers, *text}


@pytest.mark.parametrize("stage", STAGES)
def test_inputs_are_the_contract_then_the_weights_by_the_names_of_their_entries(
    lowered: dict[str, LoweredStage], stage: str
) -> None:
    model, contract, entries = lowered[stage].model, trt_stage(stage), weight_inputs(lowered[stage])
    names = [value.name for value in model.graph.inputs]
    assert names == [*(spec.name for spec in contract.inputs), *names[len(contract.inputs) :]]
    assert set(names[len(contract.inputs) :]) == entries.keys()
    assert set(entries.values()) == set(lowered[stage].stored) and all(n == e.name for n, e in entries.items())
    for value, spec in zip(model.graph.outputs, contract.outputs, strict=True):
        assert (value.name, value.dtype) == (spec.name, DTYPES[spec.dtype])
    assert not [value.name for value in model.graph.initializers.values() if value.const_value is None]
    assert {entry.dtype for entry in entries.values() if entry.weight.offset} == {"float32"}, "1 + w, whole"
    assert {entry.dtype for entry in entries.values() if not entry.weight.offset} == {"bfloat16"}


def test_caches_have_as_many_slots_as_the_contract_says() -> None:
    """A ring has the window, a linear cache the context that is asked for, or all of it: TensorRT wants a number."""
    config = preset("nano")
    for context in (None, 40):
        (decoder, _) = trt_stages_of(config, TrtOptions(context=context))
        caches = [spec.shape for spec in decoder.inputs if spec.name.startswith("cache.")]
        assert caches == [("B", 2, 16, 32)] * 10 + [("B", 2, context or config.text.max_context, 32)] * 2
    for context in (0, 513):
        with pytest.raises(UsageError, match=f"must lie in 1 to 512 for nano, but got {context}"):
            trt_stages_of(config, TrtOptions(context=context))


def test_constants_are_references_into_the_weights_file(tmp_path: Path) -> None:
    formats = trt_formats(linear_names(preset("nano")), "int4", "constant")
    stage = lowered_trt("decoder", TrtOptions(weights="constant", context=CONTEXT), formats)
    layout = WeightsLayout(WeightsPlan.merge([stage.stored]))
    bind_weights(stage, file="weights.safetensors", offsets=layout.offsets, folder=tmp_path)
    assert weight_inputs(stage) == {}
    model = proto(stage)
    assert [value.name for value in model.graph.input] == [s.name for s in trt_stage("decoder").inputs]
    external = {x.name: x for x in model.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL}
    assert external.keys() == {entry.name for entry in stage.stored}
    codes = external[f"{EMBEDDING}.codes"]
    assert (codes.data_type, list(codes.dims)) == (onnx.TensorProto.INT4, [512, 64])
    assert {x.key: x.value for x in codes.external_data}["length"] == str(512 * 32)


def test_the_tied_table_is_one_weight(lowered: dict[str, LoweredStage]) -> None:
    (use,) = (u for u in lowered["decoder"].weight_uses if u.entry.name == EMBEDDING)
    assert sorted(node.op_type for node in use.value.consumers()) == ["Gather", "Transpose"]


def test_only_the_wanted_rows_go_through_the_last_feed_forward() -> None:
    """In bfloat16 a norm stands between two casts, which the pass must know."""
    linears = [n for n in trt_program("decoder").graph.nodes if n.target is torch.ops.aten.linear.default]
    tokens = [str(tensor_value(node).shape[1]) for node in linears]
    assert len(set(tokens[:-4])) == 1 and len(set(tokens[-4:])) == 1 and tokens[0] != tokens[-1]


def test_every_product_has_rows_of_two_dimensions(lowered: dict[str, LoweredStage]) -> None:
    """Under a batch TensorRT for RTX would turn the weight anew in every step."""
    for stage in lowered.values():
        for node in (node for node in stage.model.graph if node.op_type == "MatMul"):
            turned = node.inputs[1].producer()
            if turned is not None and turned.op_type == "Transpose":
                rows = node.inputs[0].producer()
                assert rows is not None and rows.op_type == "Reshape", node.name


@pytest.mark.parametrize(
    "images_at", [[], [0], [3], [8], [0, 4, 8], [1, 5], [2, 7]], ids=lambda at: "-".join(map(str, at)) or "text"
)
def test_the_ends_of_what_a_token_sees(images_at: list[int]) -> None:
    """As the kernels have them."""
    chunk = image_chunk(12, images_at)
    assert chunk.images is not None
    ids = torch.cat([chunk.images.image_ids_BS, torch.full((1, 12), -1)])
    stage = lowered_trt("decoder", TrtOptions(dtype="float32", context=CONTEXT))
    assert np.array_equal(run_chunk(proto(stage), ids), visible_ends_BS(ids).numpy())


def run_chunk(model: ModelProto, image_ids_BS: Tensor) -> np.ndarray:
    """``chunk.visible_end`` for a chunk with these images."""
    import onnxruntime

    producers = {output: node for node in model.graph.node for output in node.output}
    needed: list[str] = ["chunk.visible_end"]
    kept: set[int] = set()
    while needed:
        node = producers.get(needed.pop())
        if node is not None and id(node) not in kept:
            kept.add(id(node))
            needed += [name for name in node.input if name]
    nodes = [node for node in model.graph.node if id(node) in kept]
    read = {name for node in nodes for name in node.input}
    graph = onnx.helper.make_graph(
        nodes,
        "ends",
        [value for value in model.graph.input if value.name in read],
        [onnx.helper.make_tensor_value_info("chunk.visible_end", onnx.TensorProto.INT32, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in read],
    )
    alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=11)
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = {"image_ids": image_ids_BS.numpy(), "token_ids": np.zeros(image_ids_BS.shape, np.int64)}
    given = {x.name: shapes[x.name] for x in session.get_inputs()}
    return np.asarray(session.run(None, given)[0])


def test_a_model_without_a_tower_takes_no_images(nano_model: Gemma3) -> None:
    config = replace(preset("nano"), vision=None)
    (stage,) = compile_for_trt(config, {}, TrtOptions(dtype="float32", context=CONTEXT))
    assert [spec.name for spec in stage.stage.inputs[:4]] == ["token_ids", "start", "length", "rows"]
    assert stage.stage.inputs[-1].name == "cache.5.v" and stage.stage.name == "decoder"

    graph = open_trt(with_weights(stage.lowered, plain(nano_model)))
    chunks = [text_chunk(lengths, seed=sum(lengths)) for lengths in ([9, 0, 20], [1, 3, 0], [1, 1, 1])]
    compare("ort.logits", EagerDecoder(nano_model, 3, CONTEXT), TrtDecoder(graph, 3), chunks)


def linear(columns: int, form: BlockFormat) -> Callable[[], LoweredStage]:
    small = small_program(
        nn.Linear(columns, 8, bias=False), torch.ones(2, 3, columns), dynamic=[{0: "B"}], formats={"weight": form}
    )
    return lambda: lower_for_trt(small.program, TrtOptions())


@pytest.mark.parametrize(
    ("columns", "form", "words"),
    [
        pytest.param(48, TRT_INT4, "cannot read 48 columns", id="a block not full"),
        pytest.param(64, INT4, "cannot read 64 columns", id="ONNX Runtime's int4"),
    ],
)
def test_formats_that_tensorrt_cannot_read_are_named(columns: int, form: BlockFormat, words: str) -> None:
    with pytest.raises(ExportError, match=f"`weight`: TensorRT {words} in BlockFormat"):
        linear(columns, form)()


@pytest.mark.parametrize("form", [TRT_INT8, TRT_FP8], ids=["int8", "fp8"])
def test_one_scale_a_row_takes_any_number_of_columns(form: BlockFormat) -> None:
    linear(49, form)()


def test_a_table_with_one_scale_a_row_is_refused() -> None:
    table = nn.Embedding(16, 32)
    small = small_program(table, torch.zeros(2, 3, dtype=torch.int64), formats={"weight": TRT_INT8})
    with pytest.raises(ExportError, match="`weight`: TensorRT cannot read 32 columns"):
        lower_for_trt(small.program, TrtOptions())


def test_a_norm_in_bfloat16_is_refused() -> None:
    """It would be rounded on its way, which the eager model is not."""
    given = (torch.ones(2, 8).bfloat16(), torch.ones(8).bfloat16())
    small = small_program(lambda x, w: F.rms_norm(x, (8,), w, 1e-6), *given)
    with pytest.raises(ExportError, match=r"a norm is computed in float32, but got torch\.bfloat16"):
        lower_for_trt(small.program, TrtOptions())


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        pytest.param(9, 0.5, r"SlidingWindowAttention occurs with .*0\.17.* and with .*0\.5", id="two scales"),
        pytest.param(8, 15, "a ring cache has as many slots as the window, but got 16", id="another window"),
    ],
)
def test_plugins_that_differ_are_refused(index: int, value: float, message: str) -> None:
    """One function stands for all nodes of a name."""
    program = trt_program("decoder")
    nodes = [n for n in program.graph.nodes if n.target is gemma3c.sliding_window_attention.default]
    nodes[3].args = (*nodes[3].args[:index], value, *nodes[3].args[index + 1 :])
    with pytest.raises(ExportError, match=message):
        lower_for_trt(program, TrtOptions(context=CONTEXT))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        pytest.param(lambda x, w, b: F.conv2d(x, w, b, stride=3), [(1, 3, 6, 6), (2, 3, 2, 2), (2,)], id="gaps"),
        pytest.param(lambda x, w, b: F.conv2d(x, w, b, stride=2), [(1, 3, 4, 6), (2, 3, 2, 2), (2,)], id="not square"),
        pytest.param(
            lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1)), [(1, 3, 4, 4), (2, 3, 2, 1), (2,)], id="wide kernel"
        ),
    ],
)
def test_other_convolutions_are_refused(function: Callable[..., Tensor], inputs: list[tuple[int, ...]]) -> None:
    small = small_program(function, *(torch.ones(shape) for shape in inputs))
    with pytest.raises(ExportError, match="only a convolution over patches side by side"):
        lower_for_trt(small.program, TrtOptions())
