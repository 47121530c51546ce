"""What the interpreter is for: a fault in the network that a plan is built from is caught, in fp32 and in bfloat16.

A fault stands in the graph that is parsed, or in the model that it was made from; the eager model beside it is sound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from gemma3_compile.model import Gemma3
from gemma3_compile.presets import preset
from gemma3_compile.stage_graphs import NOT_FOR_TRT, optimized_program, trt_stages_of
from gemma3_compile.validate.tolerances import GRAPH as TOLERANCE
from gemma3_compile.validate.tolerances import in_bfloat16 as in_bfloat16_limits
from graphs.onnx_lowering.context import TrtOptions
from graphs.onnx_lowering.lower import lower_for_trt
from graphs.trt.interpreter import Interpreter, InterpreterError
from runtimes.trt.plugin_window import SlidingWindowAttentionPlugin
from tests.graphs.decoders import EagerDecoder, image_chunk, text_chunk, worst_error
from tests.graphs.onnx_lowering.test_faults import FAR
from tests.graphs.onnx_lowering.test_trt_decoder import plain, rounded_model
from tests.graphs.trt.interpreter.stages import InterpretedDecoder, Margins, in_bfloat16, interpreted
from tests.graphs.trt_nano import CONTEXT, lowered_trt, with_weights
from tests.tolerances import TOLERANCES

Damage = Callable[[ModelProto], None]
CHUNKS = [text_chunk([n], seed=n, rows=min(n, 4)) for n in (30, 9, 1, 1)] + [image_chunk(9, [2], seed=1)]


def of_type(model: ModelProto, op: str) -> list[NodeProto]:
    found = [node for node in model.graph.node if node.op_type == op]
    assert found, f"nothing to plant the fault in: no {op}"
    return found


def before(model: ModelProto, node: NodeProto, index: int, op: str, *constants: Any, **attributes: Any) -> None:
    """Puts ``op`` between an input and its node; ``constants`` are its further inputs."""
    source, name = node.input[index], f"fault.{node.name}.{index}"
    inputs = [source]
    for number, constant in enumerate(constants):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(constant), f"{name}.{number}"))
        inputs.append(f"{name}.{number}")
    place = list(model.graph.node).index(node)
    model.graph.node.insert(place, helper.make_node(op, inputs, [name], name=name, **attributes))
    model.graph.node[place + 1].input[index] = name


def wrong_rotary_sign(model: ModelProto) -> None:
    """Every head is turned the other way."""
    for name in [node.name for node in of_type(model, "RotaryEmbedding")]:
        before(model, next(n for n in model.graph.node if n.name == name), 2, "Neg")


def swapped_tables(model: ModelProto) -> None:
    for node in of_type(model, "RotaryEmbedding"):
        node.input[1], node.input[2] = node.input[2], node.input[1]


def two_way_mask_dropped(model: ModelProto) -> None:
    """The layers are told that every token is text."""
    nodes = [n.name for n in model.graph.node if n.op_type == "Cast" and list(n.input) == ["image_ids"]]
    assert nodes
    for name in nodes:
        before(model, next(n for n in model.graph.node if n.name == name), 0, "Min", np.int64(-1))


def heads_in_another_order(op: str) -> Damage:
    """The second and third query head change places, and so do the groups that they belong to."""

    def damage(model: ModelProto) -> None:
        axis = 2 if op == "SlidingWindowAttention" else 1
        for name in [node.name for node in of_type(model, op)]:
            node = next(n for n in model.graph.node if n.name == name)
            before(model, node, 0, "Gather", np.array([0, 2, 1, 3]), axis=axis)

    return damage


def global_mask_off_by_one(model: ModelProto) -> None:
    """A token of a global layer does not see itself."""
    (node,) = of_type(model, "Less")
    before(model, node, 1, "Sub", np.int32(1))


def scaled_twice(model: ModelProto) -> None:
    """The scale of a local layer is that of a head of another size."""
    for node in of_type(model, "SlidingWindowAttention"):
        next(a for a in node.attribute if a.name == "scale").f = 0.25


def rope_factor_forgotten(model: ModelProto) -> None:
    """The frequencies of global layers are not divided by 8."""
    tables = [t for t in model.graph.initializer if list(t.dims) == [16] and numpy_helper.to_array(t)[0] == 0.125]
    assert len(tables) == 1
    tables[0].raw_data = (8 * numpy_helper.to_array(tables[0])).astype(np.float32).tobytes()


def tables_swapped(model: ModelProto) -> None:
    """Local layers have the rotary base of the global ones, and the other way round."""
    local, whole = (t for t in model.graph.initializer if list(t.dims) == [16] and t.data_type == TensorProto.FLOAT)
    local.raw_data, whole.raw_data = whole.raw_data, local.raw_data


GRAPH: dict[str, Damage] = {
    "wrong rotary sign": wrong_rotary_sign,
    "cosines for sines": swapped_tables,
    "rope factor forgotten": rope_factor_forgotten,
    "local and global bases": tables_swapped,
    "two-way mask dropped": two_way_mask_dropped,
    "heads in another order, local": heads_in_another_order("SlidingWindowAttention"),
    "heads in another order, global": heads_in_another_order("Attention"),
    "global mask off by one": global_mask_off_by_one,
    "scale of local layers": scaled_twice,
}
WINDOWS = {"no window": 64, "window one too long": 17, "window one too short": 15}


@pytest.fixture(scope="module")
def sound(nano_model: Gemma3) -> ModelProto:
    return with_weights(lowered_trt("decoder", TrtOptions(context=CONTEXT)), plain(nano_model))


def with_window(model: Gemma3, window: int) -> ModelProto:
    """The decoder of a model with another window, cache and all."""
    config = preset("nano")
    other = replace(config, name="custom", text=replace(config.text, sliding_window=window))
    options = TrtOptions(context=CONTEXT)
    stage = trt_stages_of(other, options)[0]
    program = optimized_program(other, stage, {}, without_passes=NOT_FOR_TRT, dtype=torch.bfloat16)
    return with_weights(lower_for_trt(program, options), plain(model))


def damaged(name: str, sound: ModelProto, model: Gemma3) -> ModelProto:
    if name in WINDOWS:
        return with_window(model, WINDOWS[name])
    graph = ModelProto()
    graph.CopyFrom(sound)
    GRAPH[name](graph)
    return graph


@pytest.mark.parametrize("name", [*GRAPH, *WINDOWS])
def test_a_fault_is_caught(sound: ModelProto, nano_model: Gemma3, tmp_path: Path, name: str) -> None:
    """The least of them, a mask off by one, errs by 0.14 in both; a sound network by 1e-6, and in bfloat16 by 0.05."""
    network = interpreted(damaged(name, sound, nano_model), tmp_path, wide=True)
    model = rounded_model(nano_model)
    error = worst_error(EagerDecoder(model, 1, CONTEXT), InterpretedDecoder(network, 1), CHUNKS)
    assert error > FAR * TOLERANCES["ort.logits"].relative, f"{name} errs by {error:.3g} only"
    short = Interpreter(network.program, constants=network.constants)
    exact, rounded = (EagerDecoder(each, 1, CONTEXT) for each in (model, in_bfloat16(model)))
    margins = Margins(exact, rounded, InterpretedDecoder(short, 1))
    for chunk in CHUNKS:
        margins.feed(chunk)
    limit = in_bfloat16_limits(TOLERANCE, margins.eager_error).relative
    assert limit is not None and margins.our_error > limit, f"{name}: {margins.our_error:.3g} in bfloat16"


def test_without_a_fault_both_pass(sound: ModelProto, nano_model: Gemma3, tmp_path: Path) -> None:
    network, model = interpreted(sound, tmp_path, wide=True), rounded_model(nano_model)
    error = worst_error(EagerDecoder(model, 1, CONTEXT), InterpretedDecoder(network, 1), CHUNKS)
    assert error <= TOLERANCES["ort.logits"].relative


def test_a_plugin_whose_window_is_not_its_caches(sound: ModelProto, tmp_path: Path) -> None:
    """What no plan can be run with is no matter of numbers."""
    graph = ModelProto()
    graph.CopyFrom(sound)
    for node in of_type(graph, SlidingWindowAttentionPlugin.NAME):
        next(a for a in node.attribute if a.name == "window").i = 17
    ours = InterpretedDecoder(interpreted(graph, tmp_path, wide=False), 1)
    with pytest.raises(InterpreterError, match=r"`sliding_window_attention/\w+` \(PLUGIN_V3\): its window is 17, but"):
        ours(CHUNKS[0])
