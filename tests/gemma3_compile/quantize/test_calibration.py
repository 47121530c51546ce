"""Calibration of a whole decoder, on nano: what comes out, how good it is, and what it reads."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from gemma3_compile.blocks import Blocks
from gemma3_compile.formats import EMBEDDING, INT4, INT8, is_linear
from gemma3_compile.model import Gemma3
from gemma3_compile.quantize import calibration
from gemma3_compile.quantize.calibration import calibrate
from gemma3_compile.quantize.rounding import dequantize, quantize_rtn
from gemma3_compile.quantize.text import random_tokens
from graphs.weights import BlockFormat
from runtimes.errors import NumericsError
from tests.gemma3_compile.quantize.memory_checkpoint import MemoryCheckpoint

TOKENS = random_tokens(500, 2, sequences=8, length=64)
FRESH = random_tokens(500, 2, sequences=10, length=64)[8:]


def formats_of(model: Gemma3, embedding: BlockFormat = INT4) -> dict[str, BlockFormat]:
    names = [name for name, _ in model.named_parameters() if name.startswith("decoder.") and is_linear(name)]
    return dict.fromkeys(names, INT4) | {EMBEDDING: embedding}


def rounded_model(model: Gemma3, blocks: Mapping[str, Blocks], formats: Mapping[str, BlockFormat]) -> Gemma3:
    copied = copy.deepcopy(model)
    for name, b in blocks.items():
        form = formats[name]
        copied.get_parameter(name).data = dequantize(b.codes, b.scales, b.zeros, form.bits, form.block_size)
    return copied


def rounded_to_nearest(model: Gemma3, formats: Mapping[str, BlockFormat]) -> dict[str, Blocks]:
    results = {}
    for name, form in formats.items():
        codes, scales, zeros = quantize_rtn(
            model.get_parameter(name).data, form.bits, form.block_size, form.zero_points == "integer"
        )
        results[name] = Blocks(codes=codes, scales=scales, zeros=zeros)
    return results


def logits(model: Gemma3, ids_BS: Tensor) -> Tensor:
    batch, length = ids_BS.shape
    start, rows = torch.zeros(batch, dtype=torch.int64), torch.arange(length).expand(batch, length)
    caches = model.decoder.empty_caches(batch, length)
    with torch.no_grad():
        out, _ = model.decoder(ids_BS, start, torch.full_like(start, length), rows, caches)
    return out.flatten(0, 1)


def drift(model: Gemma3, other: Gemma3, ids_BS: Tensor) -> float:
    """Mean squared error of the residual stream after the last layer, relative to its size."""
    streams: list[Tensor] = []
    for one in (model, other):
        handle = one.decoder.layers[-1].register_forward_hook(lambda module, given, made: streams.append(made[0]))
        logits(one, ids_BS)
        handle.remove()
    right, wrong = streams
    return float(((right - wrong).square().sum(-1) / right.square().sum(-1)).mean())


@pytest.fixture(scope="module")
def model(nano_model: Gemma3) -> Gemma3:
    """nano with norms that leave some channels large and most small, as trained models have them."""
    skewed = copy.deepcopy(nano_model)
    for name, weight in skewed.named_parameters():
        if name.endswith(("layernorm.weight", "decoder.norm.weight")):
            generator = torch.Generator().manual_seed(len(name))
            size = torch.logspace(0.8, -1.2, weight.numel())[torch.randperm(weight.numel(), generator=generator)]
            weight.copy_(size - 1.0)
    return skewed


@pytest.fixture(scope="module")
def calibrated(model: Gemma3) -> dict[str, Blocks]:
    return dict(calibrate(MemoryCheckpoint(model), formats_of(model), TOKENS))


@pytest.fixture(scope="module")
def linears(model: Gemma3) -> dict[str, Blocks]:
    """The linear layers alone in four bits: the table's own damping is chosen for 262,144 rows, not for nano's 512."""
    return dict(calibrate(MemoryCheckpoint(model), formats_of(model, INT8), TOKENS))


def test_each_weight_comes_once_and_in_its_format(model: Gemma3, calibrated: dict[str, Blocks]) -> None:
    names = [name for name, _ in calibrate(MemoryCheckpoint(model), formats_of(model), TOKENS[:2])]
    assert sorted(names) == sorted(formats_of(model)) and names[0] == EMBEDDING
    for name, blocks in calibrated.items():
        rows, columns = model.get_parameter(name).shape
        assert blocks.codes.shape == (rows, columns) and blocks.codes.dtype == torch.uint8
        assert blocks.zeros is not None and blocks.scales.shape == blocks.zeros.shape == (rows, -(-columns // 32))
        assert max(int(blocks.codes.max()), int(blocks.zeros.max())) <= 15


def test_the_stream_drifts_far_less_than_by_rounding_to_nearest(model: Gemma3, linears: dict[str, Blocks]) -> None:
    """On the text that it saw. Some random tokens tell random weights little about others: what real text is told
    about real text is bench/quantization.py's to measure, and here only that it does not get worse."""
    formats = formats_of(model, INT8)
    plain = rounded_model(model, rounded_to_nearest(model, formats), formats)
    ours = rounded_model(model, linears, formats)
    assert drift(model, ours, TOKENS) < 0.4 * drift(model, plain, TOKENS)
    assert drift(model, ours, FRESH) < 0.9 * drift(model, plain, FRESH)


def test_each_layer_makes_good_what_those_before_it_lost(
    model: Gemma3, linears: dict[str, Blocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the unrounded stream as the goal, each layer only keeps its own outputs, and errors add up."""
    keep = calibration._round_linear
    monkeypatch.setattr(calibration, "_round_linear", lambda w, x, goal, count, form: keep(w, x, x, count, form))
    formats = formats_of(model, INT8)
    alone = rounded_model(model, dict(calibrate(MemoryCheckpoint(model), formats, TOKENS)), formats)
    assert drift(model, rounded_model(model, linears, formats), TOKENS) < 0.6 * drift(model, alone, TOKENS)


def test_the_same_text_gives_the_same_codes(model: Gemma3, calibrated: dict[str, Blocks]) -> None:
    again = dict(calibrate(MemoryCheckpoint(model), formats_of(model), TOKENS))
    assert all(torch.equal(again[name].codes, calibrated[name].codes) for name in calibrated)


def test_eight_bits_are_rounded_to_nearest(model: Gemma3) -> None:
    formats = dict.fromkeys(formats_of(model), INT8)
    plain = rounded_to_nearest(model, formats)
    for name, blocks in calibrate(MemoryCheckpoint(model), formats, TOKENS[:1]):
        assert blocks.zeros is None and torch.equal(blocks.codes, plain[name].codes), name


def test_names_that_are_not_asked_for_stay_as_they_are(model: Gemma3) -> None:
    formats = {"decoder.layers.2.mlp.down_proj.weight": INT4, "vision.layers.0.mlp.fc1.weight": INT8}
    results = dict(calibrate(MemoryCheckpoint(model), formats, TOKENS[:1]))
    assert list(results) == ["decoder.layers.2.mlp.down_proj.weight"]


def test_one_layer_is_read_at_a_time_and_the_embedding_by_rows(model: Gemma3) -> None:
    checkpoint = MemoryCheckpoint(model)
    reading = calibrate(checkpoint, formats_of(model, INT8), TOKENS)
    next(name for name, _ in reading if name.startswith("decoder.layers.0."))
    assert not any(name.startswith("decoder.layers.1.") for name, _ in checkpoint.reads)
    list(reading)
    layer_of = [int(name.split(".")[2]) for name, _ in checkpoint.reads if name.startswith("decoder.layers.")]
    assert layer_of == sorted(layer_of), "each layer is read once, in order"
    tokens = len(TOKENS.unique())
    looked_up = [rows for name, rows in checkpoint.reads if name == EMBEDDING]
    assert looked_up.count(1) == tokens, "a token's row is read once for the exact stream"


def test_weights_that_are_not_finite_are_named(model: Gemma3) -> None:
    checkpoint = MemoryCheckpoint(model)
    checkpoint.tensors["decoder.layers.3.mlp.up_proj.weight"] = torch.full((128, 64), float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        list(calibrate(checkpoint, formats_of(model), TOKENS[:1]))
