"""Sampling against transformers' own filters, and what it promises about seeds and speed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from runtimes.errors import UsageError
from runtimes.sampling import Sampler, SamplingOptions, all_finite, candidates, largest_ids, log_normaliser

VOCAB = 1000


def some_logits(seed: int, size: int = VOCAB, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def transformers_probabilities(logits: np.ndarray, options: SamplingOptions, said: list[int]) -> np.ndarray:
    """What transformers would draw from: its processors in its order, in fp64 where it allows."""
    import torch
    from transformers import generation as hf

    chain: list[object] = [hf.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)]
    chain.append(hf.TemperatureLogitsWarper(float(options.temperature)))
    if options.top_k is not None:
        chain.append(hf.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chain.append(hf.TopPLogitsWarper(options.top_p))
    if options.min_p > 0:
        chain.append(hf.MinPLogitsWarper(options.min_p))
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for processor in chain:
        scores = processor(torch.tensor([said]), scores)  # type: ignore[operator]
    return torch.softmax(scores[0], -1).numpy()


OPTIONS = [
    SamplingOptions(temperature=1.0, top_k=5),
    SamplingOptions(temperature=1.0, top_k=64, top_p=0.95),
    SamplingOptions(temperature=0.6, top_p=0.9),
    SamplingOptions(temperature=1.7, top_p=0.999),
    SamplingOptions(temperature=1.0, min_p=0.05),
    SamplingOptions(temperature=0.8, top_k=50, top_p=0.8, min_p=0.2),
    SamplingOptions(temperature=1.0, top_p=0.02),
    SamplingOptions(temperature=1.0, top_k=VOCAB + 5, top_p=0.5),
    SamplingOptions(temperature=3.0, top_k=300, repetition_penalty=1.3),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_filters_leave_what_transformers_leaves(options: SamplingOptions, seed: int) -> None:
    logits, said = some_logits(seed), [3, 3, 900, 41]
    expected = transformers_probabilities(logits, options, said)
    penalised = logits.copy()
    for token in set(said):
        penalty = options.repetition_penalty
        penalised[token] *= penalty if penalised[token] < 0 else 1 / penalty
    ids, weights = candidates(penalised, options)
    assert set(ids.tolist()) == set(np.flatnonzero(expected).tolist())
    np.testing.assert_allclose(weights / weights.sum(), expected[ids], rtol=2e-5)
    assert np.all(np.diff(weights) <= 0)


def test_top_p_stops_where_the_sum_is_reached() -> None:
    ids, _ = candidates(np.zeros(4, dtype=np.float32), SamplingOptions(temperature=1.0, top_p=0.5))
    assert ids.tolist() == [0, 1]


@pytest.mark.parametrize("options", [SamplingOptions(temperature=1.0), OPTIONS[1], OPTIONS[4]], ids=str)
def test_draws_follow_the_probabilities(options: SamplingOptions) -> None:
    logits = some_logits(5, size=700, spread=1.5)
    expected = transformers_probabilities(logits, options, [0])
    sampler = Sampler(SamplingOptions(**{**options.__dict__, "seed": 7}), len(logits))
    draws = 20_000
    counts = np.bincount([sampler.pick(logits) for _ in range(draws)], minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    frequent = expected * draws >= 20
    deviation = (counts - expected * draws)[frequent] / np.sqrt(expected[frequent] * draws)
    assert np.abs(deviation).max() < 5
    assert abs(counts[~frequent].sum() / draws - expected[~frequent].sum()) < 0.02


def test_greedy_takes_the_largest_and_ignores_the_filters() -> None:
    logits = some_logits(2)
    sampler = Sampler(SamplingOptions(top_k=3, top_p=0.1), VOCAB)
    assert sampler.pick(logits) == int(logits.argmax())


def test_the_penalty_counts_prompt_and_own_tokens() -> None:
    logits = np.full(8, -1.0, dtype=np.float32)
    logits[:4] = [4.0, 3.9, 3.8, 3.7]
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), 8, prompt=[0])
    assert [sampler.pick(logits) for _ in range(4)] == [1, 2, 3, 0]
    assert logits[0] == 4.0, "the caller's logits must stay as they are"


def test_seeds_repeat_and_streams_differ() -> None:
    logits = some_logits(3)

    def draw(seed: int, stream: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed), VOCAB, stream=stream)
        return [sampler.pick(logits) for _ in range(20)]

    assert draw(1, 0) == draw(1, 0)
    assert draw(1, 0) != draw(2, 0)
    assert draw(1, 0) != draw(1, 1)


def test_without_a_seed_the_result_names_the_one_taken() -> None:
    logits = some_logits(4)
    sampler = Sampler(SamplingOptions(temperature=1.0), VOCAB)
    drawn = [sampler.pick(logits) for _ in range(10)]
    again = Sampler(SamplingOptions(temperature=1.0, seed=sampler.seed), VOCAB)
    assert [again.pick(logits) for _ in range(10)] == drawn


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 300, 999, 1000])
def test_largest_ids_equals_a_sort(count: int) -> None:
    values = some_logits(count, size=1003)
    assert largest_ids(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


def test_ties_with_the_last_are_kept() -> None:
    values = np.zeros(200, dtype=np.float32)
    values[[7, 70, 170]] = 1.0
    assert largest_ids(values, 2).tolist() == [7, 70, 170]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("top_p", 0.0, "0 < top_p <= 1"),
        ("top_p", 1.5, "0 < top_p <= 1"),
        ("top_k", 0, "top_k >= 1"),
        ("min_p", -0.1, "0 <= min_p <= 1"),
        ("temperature", -1.0, "0.001 <= temperature < inf"),
        ("temperature", float("nan"), "0.001 <= temperature < inf"),
        ("repetition_penalty", 0.0, "0 < repetition_penalty < inf"),
        ("seed", -1, "0 <= seed < 2"),
    ],
)
def test_an_option_out_of_range_is_refused(field: str, value: float, rule: str) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingOptions(**{field: value})  # type: ignore[arg-type]
    assert rule in caught.value.message
    assert f"but got {field}={value}" in caught.value.message


def test_log_normaliser_and_finiteness() -> None:
    logits = some_logits(8, size=262_208)
    wide = logits.astype(np.float64)
    assert log_normaliser(logits) == pytest.approx(np.log(np.exp(wide - wide.max()).sum()) + wide.max(), abs=1e-5)
    assert all_finite(logits)
    assert all_finite(np.full(4, 3e38, dtype=np.float32)), "large is not infinite"
    for bad in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[100] = bad
        assert not all_finite(broken)


def test_a_draw_from_262k_logits_is_quick() -> None:
    logits = some_logits(9, size=262_144)
    sampler = Sampler(SamplingOptions(temperature=1.0, top_k=64, top_p=0.95, seed=1), len(logits))
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        sampler.pick(logits)
        times.append(time.perf_counter() - begin)
    assert min(times) < 1.5e-3
