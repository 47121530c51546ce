"""Nano's decoder, as TensorRT's parser reads it, interpreted beside the eager model.

In fp32 throughout it must be the eager model; in bfloat16, as the network has it, it must lie as near to fp32 as the eager
model in bfloat16 does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gemma3_compile.formats import EMBEDDING, TRT_FP8, TRT_INT4, TRT_INT8
from gemma3_compile.model import Gemma3
from graphs.onnx_lowering.context import TrtOptions, WeightSource
from graphs.trt.interpreter import Interpreter, InterpreterError
from graphs.weights import BlockFormat
from tests.graphs.decoders import Chunk, EagerDecoder, compare, text_chunk
from tests.graphs.nano import WINDOW, linear_names
from tests.graphs.onnx_lowering.test_decoder import ragged
from tests.graphs.onnx_lowering.test_decoder_image import SCENES
from tests.graphs.onnx_lowering.test_trt_decoder import blocks_of, plain, rounded_model
from tests.graphs.trt.interpreter.stages import InterpretedDecoder, Margins, in_bfloat16, interpreted
from tests.graphs.trt_nano import CONTEXT, StoredWeights, lowered_trt, with_weights
from tests.graphs.unpacking import stored_values

OPTIONS = TrtOptions(context=CONTEXT)


@pytest.fixture(scope="module")
def wide(nano_model: Gemma3, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    model = with_weights(lowered_trt("decoder", OPTIONS), plain(nano_model))
    return interpreted(model, tmp_path_factory.mktemp("wide"), wide=True)


@pytest.fixture(scope="module")
def short(wide: Interpreter) -> Interpreter:
    return Interpreter(wide.program, constants=wide.constants)


@pytest.fixture(scope="module")
def eager(nano_model: Gemma3) -> Gemma3:
    """With weights as the file holds them."""
    return rounded_model(nano_model)


def test_a_ragged_batch_past_the_window(wide: Interpreter, eager: Gemma3) -> None:
    compare("ort.logits", EagerDecoder(eager, 3, CONTEXT), InterpretedDecoder(wide, 3), ragged())


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
def test_one_chunk_then_steps_around_multiples_of_the_window(wide: Interpreter, eager: Gemma3, length: int) -> None:
    chunks = [text_chunk([length], seed=length, rows=length), *(text_chunk([1], seed=i) for i in range(6))]
    compare("ort.logits", EagerDecoder(eager, 1, CONTEXT), InterpretedDecoder(wide, 1), chunks)


@pytest.mark.parametrize("name", SCENES)
def test_images_as_eager_sees_them(wide: Interpreter, eager: Gemma3, name: str) -> None:
    compare("ort.logits", EagerDecoder(eager, 1, CONTEXT), InterpretedDecoder(wide, 1), SCENES[name])


def test_an_idle_sequence_keeps_what_it_holds(short: Interpreter) -> None:
    decoder = InterpretedDecoder(short, 2)
    decoder(text_chunk([20, 21]))
    before = {name: cache[1].copy() for name, cache in decoder.caches.items()}
    decoder(text_chunk([5, 0], seed=1))
    decoder(text_chunk([1, 0], seed=2))
    for name, cache in decoder.caches.items():
        held = WINDOW if cache.shape[2] == WINDOW else 21
        assert np.array_equal(cache[1][:, :held], before[name][:, :held]), name


def test_the_last_slot_of_the_context(wide: Interpreter, eager: Gemma3) -> None:
    """And no further: TensorRT would write past the cache."""
    ours = InterpretedDecoder(wide, 1)
    chunks = [text_chunk([CONTEXT - 2], seed=1), text_chunk([1], seed=2), text_chunk([1], seed=3)]
    compare("ort.logits", EagerDecoder(eager, 1, CONTEXT), ours, chunks)
    with pytest.raises(InterpreterError, match=f"writes 1 rows from slot {CONTEXT} on into a cache of {CONTEXT}"):
        ours(text_chunk([1], seed=4))


ALL: dict[str, tuple[int, list[Chunk]]] = {
    "a ragged batch": (3, ragged()),
    "images": (1, [*SCENES["two images side by side"], *SCENES["three chunks of images in a row"]]),
}


@pytest.mark.parametrize("name", ALL)
def test_in_bfloat16_it_is_as_near_to_fp32_as_the_eager_model(short: Interpreter, eager: Gemma3, name: str) -> None:
    batch, chunks = ALL[name]
    exact, rounded = (EagerDecoder(model, batch, CONTEXT) for model in (eager, in_bfloat16(eager)))
    margins = Margins(exact, rounded, InterpretedDecoder(short, batch))
    for chunk in chunks:
        margins.feed(chunk)
    assert 1e-3 < margins.our_error < 2 * margins.eager_error < 0.2, (margins.our_error, margins.eager_error)


FORMS: dict[str, tuple[BlockFormat | None, WeightSource, bool]] = {
    "bfloat16 constants": (None, "constant", False),
    "int4 inputs": (TRT_INT4, "input", False),
    "int4 constants, the table too": (TRT_INT4, "constant", True),
    "int8": (TRT_INT8, "input", False),
    "fp8": (TRT_FP8, "input", False),
}


@pytest.mark.parametrize("name", FORMS)
def test_weights_mean_what_their_format_says(nano_model: Gemma3, tmp_path: Path, name: str) -> None:
    form, weights, table = FORMS[name]
    state = nano_model.state_dict()
    names = [n for n in linear_names(nano_model.config) if n.startswith("decoder.")]
    formats = {} if form is None else dict.fromkeys([*names, *([EMBEDDING] if table else [])], form)
    stored = StoredWeights(plain=state, blocks=blocks_of(state, formats))
    lowered = lowered_trt("decoder", TrtOptions(weights=weights, context=CONTEXT), formats)
    changed: dict[str, torch.Tensor] = {}
    for weight in {entry.weight for entry in lowered.stored if entry.weight.format is not None}:
        data = {part.name: stored.file_data(part) for part in weight.stored()}
        rows = [state[source].shape[0] for source in weight.sources]
        values = torch.from_numpy(stored_values(data, weight))
        changed |= dict(zip(weight.sources, torch.split(values, rows), strict=True))
    ours = InterpretedDecoder(interpreted(with_weights(lowered, stored), tmp_path, wide=True), 3)
    compare("ort.logits", EagerDecoder(rounded_model(nano_model, changed), 3, CONTEXT), ours, ragged()[:5])


def test_every_kind_of_layer_is_read_with_all_that_it_has(wide: Interpreter) -> None:
    kinds = wide.program.kinds()
    assert len(kinds) == 21 and {"PLUGIN_V3", "KV_CACHE_UPDATE", "ATTENTION_INPUT"} <= set(kinds)
    plugins = [layer for layer in wide.program.layers if layer.kind == "PLUGIN_V3"]
    assert {layer.attributes["plugin"].window for layer in plugins} == {WINDOW}
