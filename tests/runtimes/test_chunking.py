"""Chunks never cut a picture, and each brings the feature rows of its pictures."""

from __future__ import annotations

import random

import numpy as np
import pytest

from runtimes.chunking import chunks, split
from runtimes.errors import UsageError


def layout(*runs: int) -> np.ndarray:
    """Positive: a run of text. Negative: a picture of that many tokens. Pictures are numbered in order."""
    ids, picture = [], 0
    for run in runs:
        ids += [-1] * run if run > 0 else [picture] * -run
        picture += run < 0
    return np.array(ids, dtype=np.int64)


def test_text_is_cut_at_the_size() -> None:
    assert split(layout(10), 4) == [(0, 4), (4, 8), (8, 10)]
    assert split(layout(8), 4) == [(0, 4), (4, 8)]


def test_a_picture_that_does_not_fit_opens_the_next_chunk() -> None:
    assert split(layout(2, -4, 3), 5) == [(0, 2), (2, 7), (7, 9)]


def test_a_picture_that_fits_exactly_stays() -> None:
    assert split(layout(1, -4, 3), 5) == [(0, 5), (5, 8)]


def test_a_picture_larger_than_a_chunk_makes_it_grow() -> None:
    assert split(layout(2, -9, 3), 4) == [(0, 2), (2, 11), (11, 14)]
    assert split(layout(-9), 4) == [(0, 9)]


def test_neighbouring_pictures_may_part() -> None:
    assert split(layout(-3, -3, -3), 6) == [(0, 6), (6, 9)]
    assert split(layout(-3, -3, -3), 4) == [(0, 3), (3, 6), (6, 9)]


def test_a_start_within_the_prompt() -> None:
    assert split(layout(6, -4, 3), 5, begin=4) == [(4, 6), (6, 11), (11, 13)]
    assert split(layout(6), 5, begin=6) == []


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="chunk >= 1"):
        split(layout(3), 0)


@pytest.mark.parametrize("seed", range(40))
def test_chunks_rebuild_the_prompt(seed: int) -> None:
    rng = random.Random(seed)
    image_ids = layout(*(rng.choice([1, -1]) * rng.randint(1, 9) for _ in range(rng.randint(1, 9))))
    token_ids = np.arange(100, 100 + len(image_ids))
    size = rng.randint(1, 12)
    features = np.arange((image_ids >= 0).sum(), dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    made = list(chunks(token_ids, image_ids, features, size))

    assert np.concatenate([chunk.token_ids for chunk in made]).tolist() == token_ids.tolist()
    seen_rows: list[float] = []
    pictures: list[set[int]] = []
    for chunk in made:
        longest = 0
        if chunk.has_image:
            assert chunk.features is not None and chunk.feature_rows is not None and chunk.image_ids is not None
            rows = chunk.feature_rows
            assert ((rows >= 0) == (chunk.image_ids >= 0)).all()
            seen_rows += chunk.features[rows[rows >= 0], 0].tolist()
            ids = chunk.image_ids[chunk.image_ids >= 0]
            pictures.append(set(ids.tolist()))
            longest = int(np.bincount(ids).max())
        assert len(chunk) <= max(size, longest)
    assert seen_rows == features[:, 0].tolist()
    whole = [picture for chunk in pictures for picture in chunk]
    assert len(whole) == len(set(whole)), "a picture went into two chunks"
