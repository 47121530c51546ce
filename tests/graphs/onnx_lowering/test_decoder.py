"""The text decoder of nano in ONNX Runtime against eager: ragged batches, idle sequences, windows that wrap."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autotune.kernels.cache_layout import slot_positions_BC
from gemma3_compile.model import Gemma3
from graphs.onnx_lowering.context import OrtOptions
from graphs.onnx_lowering.lower import lower_for_ort
from graphs.passes import PASSES, run_passes
from tests.graphs.decoders import Chunk, EagerDecoder, OrtDecoder, compare, text_chunk
from tests.graphs.nano import WINDOW, raw_program
from tests.graphs.ort import Stored, open_graph, save

Array = NDArray[np.float32]
CONTEXT = 128
SLOTS = (WINDOW, WINDOW + 1, WINDOW + 7)
"""A local layer's cache without slack, and with some."""
RAGGED = [
    [7, 5, 0],  # the third sequence has not begun
    [20, 0, 13],  # beyond the window in one chunk; the second is idle
    [1, 1, 1],
    [0, 3, 1],
    [16, 15, 17],  # a window, one less, one more
    [1, 0, 1],
    [1, 1, 0],
    [1, 1, 1],
    [33, 2, 1],  # more than two windows beside a short one
    [1, 1, 1],
]


def ragged() -> list[Chunk]:
    return [text_chunk(lengths, seed=i, rows=1 + (min(lengths) > 1)) for i, lengths in enumerate(RAGGED)]


@pytest.mark.parametrize("slots", SLOTS)
def test_a_ragged_batch_past_the_window(graphs: Mapping[str, Any], nano_model: Gemma3, slots: int) -> None:
    ours = OrtDecoder(graphs, 3, CONTEXT, slots=slots)
    compare("ort.logits", EagerDecoder(nano_model, 3, CONTEXT), ours, ragged())


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 18, 22, 23, 24, 31, 32, 33, 48])
def test_one_chunk_then_steps_around_multiples_of_the_window(
    graphs: Mapping[str, Any], nano_model: Gemma3, length: int, slots: int
) -> None:
    chunks = [text_chunk([length], seed=length, rows=length), *(text_chunk([1], seed=i) for i in range(10))]
    compare("ort.logits", EagerDecoder(nano_model, 1, 64), OrtDecoder(graphs, 1, 64, slots=slots), chunks)


def test_the_chunking_does_not_show(graphs: Mapping[str, Any]) -> None:
    """The same 50 tokens in one chunk, in uneven ones and one by one."""
    whole = text_chunk([50], seed=3)
    last = {}
    for sizes in ((50,), (16, 16, 16, 2), (1, 30, 19), (1,) * 50):
        decoder, at = OrtDecoder(graphs, 1, 64), 0
        for size in sizes:
            part = whole.token_ids_BS[:, at : at + size]
            outputs = decoder(
                Chunk(token_ids_BS=part, length_B=torch.tensor([size]), rows_BR=torch.tensor([[size - 1]]))
            )
            at += size
        last[sizes] = outputs["logits"]
    first = last[(50,)]
    scale = np.abs(first).max()
    for sizes, logits in last.items():
        assert np.abs(logits - first).max() <= 2e-5 * scale, sizes


@pytest.mark.parametrize("slots", SLOTS)
def test_an_idle_sequence_keeps_its_caches_to_the_bit(graphs: Mapping[str, Any], slots: int) -> None:
    """All that it holds; what lies beyond its end may be written."""
    decoder = OrtDecoder(graphs, 2, 64, slots=slots)
    decoder(text_chunk([20, 21]))
    before = {name: cache[1].copy() for name, cache in decoder.caches.items()}
    decoder(text_chunk([5, 0], seed=1))
    for name, cache in decoder.caches.items():
        held = held_rows(cache, 21)
        assert np.array_equal(cache[1][:, :held], before[name][:, :held]), name


def test_the_context_may_be_of_any_size(graphs: Mapping[str, Any], nano_model: Gemma3) -> None:
    """The last token of the context counts, and a longer context changes nothing."""
    for context in (24, 300):
        chunks = [text_chunk([20], seed=5), text_chunk([3], seed=6), text_chunk([1], seed=7)]
        compare("ort.logits", EagerDecoder(nano_model, 1, context), OrtDecoder(graphs, 1, context), chunks)


@pytest.mark.parametrize("slots", SLOTS)
def test_in_place_is_out_of_place_to_the_bit(graphs: Mapping[str, Any], slots: int) -> None:
    """The output of every cache bound to its input's buffer, as a session binds it."""
    plain = OrtDecoder(graphs, 3, CONTEXT, slots=slots)
    bound = OrtDecoder(graphs, 3, CONTEXT, slots=slots, in_place=True)
    addresses = {name: cache.ctypes.data for name, cache in bound.caches.items()}
    for chunk in ragged():
        expected, ours = plain(chunk), bound(chunk)
        active = chunk.length_B.numpy() > 0
        assert np.array_equal(ours["logits"][active], expected["logits"][active])
        for name, cache in plain.caches.items():
            for sequence, end in enumerate(plain.start_B.tolist()):
                held = held_rows(cache, end)
                assert np.array_equal(bound.caches[name][sequence, :, :held], cache[sequence, :, :held]), name
    assert addresses == {name: cache.ctypes.data for name, cache in bound.caches.items()}


def held_rows(cache_BGCD: Array, end: int) -> int:
    """Rows from 0 that hold positions after ``end`` tokens."""
    slots = cache_BGCD.shape[2]
    return end if slots >= 64 else int(slot_positions_BC(torch.tensor([end]), WINDOW, slots, "compact").ge(0).sum())


@pytest.mark.parametrize("left_out", [step.name for step in PASSES])
def test_without_a_pass_the_graph_still_lowers(left_out: str, nano_model: Gemma3, tmp_path: Path) -> None:
    program = raw_program("decoder")
    run_passes(program, without=[left_out])
    paths = save(tmp_path, [lower_for_ort(program, OrtOptions())], Stored(plain=nano_model.state_dict()))
    ours = OrtDecoder({"decoder": open_graph(paths["decoder"])}, 3, CONTEXT)
    compare("ort.logits", EagerDecoder(nano_model, 3, CONTEXT), ours, ragged()[:3])


def test_without_any_pass_the_graph_still_lowers(nano_model: Gemma3, tmp_path: Path) -> None:
    paths = save(tmp_path, [lower_for_ort(raw_program("decoder"), OrtOptions())], Stored(plain=nano_model.state_dict()))
    ours = OrtDecoder({"decoder": open_graph(paths["decoder"])}, 3, CONTEXT)
    compare("ort.logits", EagerDecoder(nano_model, 3, CONTEXT), ours, ragged()[:3])
