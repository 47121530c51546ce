"""The ``trt`` dialect's one decoder of nano against eager, its plugins through their functions: text, images, idle sequences.

The graph is run in fp32; the graph that TensorRT gets, in bfloat16, is run with bfloat16 read as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gemma3_compile.blocks import Blocks
from gemma3_compile.formats import EMBEDDING, TRT_FP8, TRT_INT4, TRT_INT8
from gemma3_compile.model import Gemma3
from gemma3_compile.weights_writer import round_to_nearest
from graphs.onnx_lowering.context import TrtOptions, WeightSource
from graphs.onnx_lowering.lower import lower_for_trt
from graphs.ops import gemma3c
from graphs.program import Program
from graphs.weights import BlockFormat
from tests.graphs.decoders import EagerDecoder, compare, image_chunk, text_chunk, worst_error
from tests.graphs.nano import WINDOW, linear_names
from tests.graphs.onnx_lowering.test_decoder import ragged
from tests.graphs.onnx_lowering.test_decoder_image import SCENES, STEPS
from tests.graphs.onnx_lowering.test_faults import FAR, TEXT, set_argument
from tests.graphs.trt_nano import (
    CONTEXT,
    StoredWeights,
    TrtDecoder,
    in_float32,
    lowered_trt,
    open_trt,
    trt_program,
    with_weights,
)
from tests.graphs.unpacking import stored_values
from tests.tolerances import TOLERANCES

FP32 = TrtOptions(dtype="float32", context=CONTEXT)


def plain(model: Gemma3) -> StoredWeights:
    return StoredWeights(plain=model.state_dict(), blocks={})


@pytest.fixture(scope="module")
def graph(nano_model: Gemma3) -> Any:
    return open_trt(with_weights(lowered_trt("decoder", FP32), plain(nano_model)))


def blocks_of(state: Mapping[str, torch.Tensor], formats: Mapping[str, BlockFormat]) -> dict[str, Blocks]:
    """The weights rounded to their formats."""
    return {name: round_to_nearest(state[name], form) for name, form in formats.items()}


def rounded_model(model: Gemma3, changed: Mapping[str, torch.Tensor] | None = None) -> Gemma3:
    """Weights in bfloat16, but for the decoder's norms, whose whole factor 1 + w the file holds in fp32."""
    state = {
        name: tensor if name.startswith("decoder.") and tensor.dim() == 1 else tensor.bfloat16().float()
        for name, tensor in model.state_dict().items()
    }
    state["vision.soft_emb_norm.weight"] = model.state_dict()["vision.soft_emb_norm.weight"]
    copy = Gemma3(model.config).eval().requires_grad_(False)
    copy.load_state_dict(state | dict(changed or {}))
    return copy


def test_a_ragged_batch_past_the_window(graph: Any, nano_model: Gemma3) -> None:
    compare("ort.logits", EagerDecoder(nano_model, 3, CONTEXT), TrtDecoder(graph, 3), ragged())


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 48])
def test_one_chunk_then_steps_around_multiples_of_the_window(graph: Any, nano_model: Gemma3, length: int) -> None:
    chunks = [text_chunk([length], seed=length, rows=length), *(text_chunk([1], seed=i) for i in range(6))]
    compare("ort.logits", EagerDecoder(nano_model, 1, CONTEXT), TrtDecoder(graph, 1), chunks)


@pytest.mark.parametrize("name", SCENES)
def test_images_as_eager_sees_them(graph: Any, nano_model: Gemma3, name: str) -> None:
    compare("ort.logits", EagerDecoder(nano_model, 1, CONTEXT), TrtDecoder(graph, 1), SCENES[name])


def test_padding_behind_the_real_tokens(graph: Any, nano_model: Gemma3) -> None:
    """A padding row may write past the end of a linear cache, never into the ring."""
    chunk = replace(image_chunk(12, [2], seed=6), length_B=torch.tensor([7]), rows_BR=torch.tensor([[6, 0]]))
    chunks = [text_chunk([14], seed=7), chunk, *STEPS]
    compare("ort.logits", EagerDecoder(nano_model, 1, CONTEXT), TrtDecoder(graph, 1), chunks)


def test_an_idle_sequence_keeps_its_ring_to_the_bit_and_what_its_linear_cache_holds(graph: Any) -> None:
    decoder = TrtDecoder(graph, 2)
    decoder(text_chunk([20, 21]))
    before = {name: cache[1].copy() for name, cache in decoder.caches.items()}
    decoder(text_chunk([5, 0], seed=1))
    for name, cache in decoder.caches.items():
        held = WINDOW if cache.shape[2] == WINDOW else 21
        assert np.array_equal(cache[1][:, :held], before[name][:, :held]), name


def test_the_last_slot_of_the_context(graph: Any, nano_model: Gemma3) -> None:
    chunks = [text_chunk([CONTEXT - 2], seed=1), text_chunk([1], seed=2), text_chunk([1], seed=3)]
    compare("ort.logits", EagerDecoder(nano_model, 1, CONTEXT), TrtDecoder(graph, 1), chunks)


@pytest.mark.parametrize("weights", ["input", "constant"])
def test_the_graph_in_bfloat16_is_the_same_graph(nano_model: Gemma3, weights: WeightSource) -> None:
    options = TrtOptions(weights=weights, context=CONTEXT)
    ours = open_trt(in_float32(with_weights(lowered_trt("decoder", options), plain(nano_model))))
    model = rounded_model(nano_model)
    compare("ort.logits", EagerDecoder(model, 3, CONTEXT), TrtDecoder(ours, 3), ragged())
    chunks = SCENES["a long chunk on a full window"]
    compare("ort.logits", EagerDecoder(model, 1, CONTEXT), TrtDecoder(ours, 1), chunks)


@pytest.mark.parametrize(
    ("form", "weights", "table"),
    [
        pytest.param(TRT_INT4, "input", False, id="int4 inputs"),
        pytest.param(TRT_INT4, "constant", True, id="int4 constants, the table too"),
        pytest.param(TRT_INT8, "input", False, id="int8"),
        pytest.param(TRT_FP8, "input", False, id="fp8"),
    ],
)
def test_quantised_weights_mean_what_their_format_says(
    nano_model: Gemma3, form: BlockFormat, weights: WeightSource, table: bool
) -> None:
    state = nano_model.state_dict()
    names = [name for name in linear_names(nano_model.config) if name.startswith("decoder.")]
    formats = dict.fromkeys([*names, *([EMBEDDING] if table else [])], form)
    blocks = blocks_of(state, formats)
    lowered = lowered_trt("decoder", TrtOptions(weights=weights, context=CONTEXT), formats)
    stored = StoredWeights(plain=state, blocks=blocks)
    meant = {
        entry.weight: stored_values({part.name: stored.file_data(part) for part in entry.weight.stored()}, entry.weight)
        for entry in lowered.stored
        if entry.weight.format is not None
    }
    changed: dict[str, torch.Tensor] = {}
    for weight, values in meant.items():
        rows = [state[source].shape[0] for source in weight.sources]
        changed |= dict(zip(weight.sources, torch.from_numpy(values).split(rows), strict=True))
    ours = TrtDecoder(open_trt(in_float32(with_weights(lowered, stored))), 3)
    compare("ort.logits", EagerDecoder(rounded_model(nano_model, changed), 3, CONTEXT), ours, ragged()[:5])
    error = max(float((changed[name] - state[name]).abs().max() / state[name].abs().max()) for name in formats)
    assert 0.001 < error < 0.2, "the weights were rounded, and not beyond recognition"


def other_images(program: Program) -> None:
    """Every layer is told of no image."""
    for node in program.graph.nodes:
        if node.target in (WINDOW_OP, gemma3c.global_attention.default):
            node.args = (*node.args[:7], None, *node.args[8:])


WINDOW_OP = gemma3c.sliding_window_attention.default
FAULTS: dict[str, Callable[[Program], None]] = {
    "rope factor 1": set_argument(gemma3c.rotary_table.default, 3, 1.0),
    "scale of local layers": set_argument(WINDOW_OP, 9, 0.2),
    "scale of global layers": set_argument(gemma3c.global_attention.default, 8, 0.2),
    "causal images": other_images,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(nano_model: Gemma3, name: str) -> None:
    program = trt_program("decoder", "float32")
    FAULTS[name](program)
    ours = TrtDecoder(open_trt(with_weights(lower_for_trt(program, FP32), plain(nano_model))), 1)
    chunks = [*TEXT, image_chunk(9, [2], seed=1)]
    error = worst_error(EagerDecoder(nano_model, 1, CONTEXT), ours, chunks)
    assert error > FAR * TOLERANCES["ort.logits"].relative, f"{name} errs by {error:.3g} only"
