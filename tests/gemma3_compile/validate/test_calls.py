"""The calls that a validation makes are the eager model, and the weights it reads back are what was stored."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pytest
import torch

from gemma3_compile.facts import model_facts
from gemma3_compile.model import Gemma3
from gemma3_compile.validate.calls import Embedding
from gemma3_compile.validate.cases import Case, Passage, image_cases, text_cases
from gemma3_compile.validate.end_to_end import hidden_states
from gemma3_compile.validate.vision_calls import features_of
from gemma3_compile.validate.weights import dequantize
from graphs.packing import pack_codes, pack_zeros
from graphs.weights import BlockFormat, Part, ZeroPoints
from tests.gemma3_compile.validate.test_hypotheses import ModelWeights
from tests.tolerances import check


def eager_logits(model: Gemma3, passage: Passage, features_MH: torch.Tensor) -> torch.Tensor:
    """The model's own forward pass over the passage's pieces: logits [S, V]."""
    caches, rows, logits = model.decoder.empty_caches(1, len(passage)), torch.from_numpy(passage.feature_rows()), []
    for begin, end in passage.pieces():
        image = passage.has_image(begin, end)
        out, caches = model.decoder(
            torch.from_numpy(passage.token_ids)[None, begin:end],
            torch.tensor([begin]),
            torch.tensor([end - begin]),
            torch.arange(end - begin)[None],
            caches,
            features_MH if image else None,
            rows[None, begin:end] if image else None,
            torch.from_numpy(passage.image_ids)[None, begin:end] if image else None,
        )
        logits.append(out[0])
    return torch.cat(logits)


def cases_of(model: Gemma3) -> list[Case]:
    facts = model_facts(model.config, None)
    generator = np.random.default_rng(2)

    def ids(count: int) -> np.ndarray:
        return generator.integers(4, 490, size=count)

    return [*text_cases(facts, ids, None), *image_cases(facts, ids)]


def test_layer_by_layer_is_the_models_own_forward(nano_model: Gemma3) -> None:
    weights, cases = ModelWeights(nano_model), cases_of(nano_model)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert nano_model.vision is not None
    features = nano_model.vision(pixels)
    check("eager.chunking", features_of(weights, pixels), features)
    embedding, flat = Embedding(weights), features.flatten(0, 1)
    hidden = hidden_states(weights, embedding, cases, flat)
    for case in cases:
        for index, passage in enumerate(case.passages):
            ours = embedding.head(hidden[case.name, index]).run()
            check("eager.chunking", ours, eager_logits(nano_model, passage, flat), case.name)


FORMATS = list(itertools.product((4, 8), ("none", "integer", "minimum"), (32, 16)))


@pytest.mark.parametrize(("bits", "zero_points", "block"), FORMATS)
def test_stored_blocks_are_read_back_as_their_format_means(
    bits: Literal[4, 8], zero_points: ZeroPoints, block: int
) -> None:
    rows, columns = 5, 80  # the last block of 32 is half padding
    form, generator = BlockFormat(bits=bits, block_size=block, zero_points=zero_points), np.random.default_rng(bits)
    blocks = form.blocks(columns)
    codes = generator.integers(0, 2**bits, size=(rows, columns), dtype=np.uint8)
    zeros = generator.integers(0, 2**bits, size=(rows, blocks), dtype=np.uint8)
    scales, minimums = (generator.normal(size=(rows, blocks)).astype(np.float32) for _ in range(2))
    parts: dict[Part, torch.Tensor] = {
        "codes": torch.from_numpy(pack_codes(codes, form)),
        "scales": torch.from_numpy(scales),
        "zeros": torch.from_numpy(pack_zeros(zeros, form)),
        "minimums": torch.from_numpy(minimums),
    }
    found = dequantize({part: parts[part] for part in form.parts}, form)[:, :columns].numpy()
    for row, column in itertools.product(range(rows), range(columns)):
        n = column // block
        zero = int(zeros[row, n]) if zero_points == "integer" else 2 ** (bits - 1)
        expected = (int(codes[row, column]) - zero) * scales[row, n]
        if zero_points == "minimum":
            expected -= minimums[row, n]
        assert found[row, column] == pytest.approx(expected, rel=1e-6, abs=1e-6)
