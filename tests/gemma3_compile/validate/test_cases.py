"""The cases reach what they are there for, in every size."""

from __future__ import annotations

import numpy as np
import pytest

from gemma3_compile.facts import model_facts
from gemma3_compile.presets import PRESETS, preset
from gemma3_compile.validate.cases import (
    Case,
    Passage,
    all_rows,
    ids_of,
    image_cases,
    noise_pictures,
    prompt_case,
    text_cases,
    window_of,
)
from runtimes.chat import Prompt
from runtimes.manifest import ModelFacts


def facts_of(size: str) -> ModelFacts:
    return model_facts(preset(size), None)


def every(facts: ModelFacts) -> list[Case]:
    ids = ids_of(facts, None)
    pictured = image_cases(facts, ids) if facts.image is not None else ()
    return [*text_cases(facts, ids, None), *pictured]


@pytest.mark.parametrize("size", PRESETS)
def test_pieces_cover_each_passage_and_cut_no_picture(size: str) -> None:
    facts = facts_of(size)
    for case in every(facts):
        for passage in case.passages:
            pieces = list(passage.pieces())
            assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
            assert pieces[-1][1] == len(passage) <= facts.max_context
            for _, cut in pieces[:-1]:
                assert passage.image_ids[cut - 1] < 0 or passage.image_ids[cut - 1] != passage.image_ids[cut]


@pytest.mark.parametrize("size", PRESETS)
def test_decode_passes_the_window_wraps_its_cache_and_the_batch_is_unequal(size: str) -> None:
    facts, slack = facts_of(size), 4
    _, decode = text_cases(facts, ids_of(facts, None), None, slack)
    passing, wrapping, short = decode.passages
    window = window_of(facts)
    assert passing.bounds[-1][1] < window < len(passing)
    assert wrapping.bounds[-1][1] < window + slack < len(wrapping)
    assert len(short) < window


def test_fewer_tokens_can_be_asked_for() -> None:
    facts = facts_of("270m")
    chunks, decode = text_cases(facts, ids_of(facts, None), 20)
    assert len(chunks.passages[0]) == 20
    assert [passage.bounds[-1][1] for passage in decode.passages] == [20, 20, 5]


@pytest.mark.parametrize("size", ["nano", "4b", "27b"])
def test_a_picture_stands_across_the_windows_edge(size: str) -> None:
    facts = facts_of(size)
    alone, pair = (case.passages[0] for case in image_cases(facts, ids_of(facts, None)))
    window, count = window_of(facts), facts.image.tokens_per_image if facts.image else 0
    second = np.flatnonzero(pair.image_ids == 1)
    assert len(second) == count and second[0] < window <= second[-1]
    assert any(pair.has_image(*bounds) and set(pair.image_ids[slice(*bounds)]) >= {0, 1} for bounds in pair.bounds)
    place = np.flatnonzero(alone.image_ids == 0)
    assert (place[0], place[-1] + 1) in alone.bounds


def test_logits_of_a_chunk_stay_small() -> None:
    facts = facts_of("27b")
    text = text_cases(facts, ids_of(facts, None), None)[0].passages[0]
    assert all(all_rows(facts, end - begin) for begin, end in text.bounds)
    assert not all_rows(facts, 512)


def test_ids_without_a_tokenizer_are_ordinary_tokens() -> None:
    facts = facts_of("nano")
    ids = ids_of(facts, None)(300)
    assert ids[0] == facts.tokens.bos
    special = {facts.tokens.pad, facts.tokens.unk, *facts.tokens.end, facts.tokens.image, facts.tokens.start_of_image}
    assert not special & set(ids[1:].tolist())


def test_features_of_a_chunk_are_its_own_pictures_rows() -> None:
    facts = facts_of("nano")
    pair = image_cases(facts, ids_of(facts, None))[1].passages[0]
    rows = np.arange(8, dtype=np.float32)[:, None].repeat(3, axis=1)
    begin, end = next(bounds for bounds in pair.bounds if pair.has_image(*bounds))
    chunk = pair.chunk(begin, end, rows)
    assert chunk.features is not None and chunk.feature_rows is not None
    assert chunk.features[:, 0].tolist() == list(range(8))
    assert (chunk.feature_rows >= 0).sum() == 8


def test_a_prompt_is_cut_before_a_picture_never_in_it() -> None:
    image_ids = np.array([-1, -1, 0, 0, 0, 0, -1, -1])
    prompt = Prompt(token_ids=np.arange(8), image_ids=image_ids, pixels=np.zeros((1, 3, 4, 4), np.float32))
    case = prompt_case(prompt, 4, 2)
    assert len(case.passages[0]) == 2
    whole = prompt_case(prompt, None, 2).passages[0]
    assert whole.image_ids.tolist() == [-1, -1, 2, 2, 2, 2, -1, -1]


def test_the_last_tokens_as_steps() -> None:
    passage = Passage(token_ids=np.arange(12), image_ids=np.full(12, -1), bounds=((0, 5), (5, 10), (10, 12)))
    assert passage.with_steps(4).bounds == ((0, 5), (5, 8))
    assert passage.with_steps(4).steps == 4


def test_noise_is_the_same_every_time_and_within_range() -> None:
    first, again = (noise_pictures(facts_of("nano"), 2) for _ in range(2))
    assert first.shape == (2, 3, 56, 56) and first.dtype == np.float32
    assert np.array_equal(first, again) and np.abs(first).max() <= 1
    assert not np.array_equal(first[0], first[1])
