"""The runtime on a real bundle of nano, against the eager model with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import runtimes
from gemma3_compile.checkpoints import load_eager, open_checkpoint
from gemma3_compile.model import Gemma3
from runtimes import chunking
from runtimes.chat import Prompt, render, user_message
from runtimes.conversation import text_tokens
from runtimes.engine import Engine
from runtimes.session import Chunk
from tests.runtimes.conftest import NANO_SEED

TOLERANCE = 2e-5  # relative to the largest logit: fp32 on both sides, sums in another order
WINDOW, CONTEXT = 16, 512


@pytest.fixture(scope="module")
def engine(nano_bundle: Path) -> Iterator[Engine]:
    with runtimes.load(nano_bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def eager() -> Gemma3:
    with open_checkpoint(None, size="nano", random_seed=NANO_SEED) as checkpoint:
        return load_eager(checkpoint)


def eager_logits(model: Gemma3, prompt: Prompt) -> np.ndarray:
    """[S, V]: the whole prompt at once."""
    size, pictures = len(prompt), ()
    is_image = prompt.image_ids >= 0
    with torch.no_grad():
        if prompt.pixels is not None:
            features = model.vision(torch.from_numpy(prompt.pixels)).flatten(0, 1)
            rows = torch.from_numpy(np.where(is_image, np.cumsum(is_image) - 1, -1))[None]
            pictures = (features, rows, torch.from_numpy(prompt.image_ids)[None])
        logits, _ = model.decoder(
            torch.from_numpy(prompt.token_ids)[None],
            torch.zeros(1, dtype=torch.int64),
            torch.tensor([size]),
            torch.arange(size)[None],
            model.decoder.empty_caches(1, size),
            *pictures,
        )
    return np.asarray(logits[0])


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def some_tokens(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 100, count)


@pytest.mark.parametrize("size", [1, WINDOW - 1, WINDOW, WINDOW + 1, 60])
def test_chunks_then_steps(engine: Engine, eager: Gemma3, size: int) -> None:
    tokens = some_tokens(size, 70)
    expected = eager_logits(eager, text_tokens(tokens.tolist()))
    session, caches = engine.session, engine.session.open_caches(1, 80)
    for begin, end in chunking.split(np.full(60, -1), size):
        logits = session.extend(caches, 0, Chunk(token_ids=tokens[begin:end]), "all")
        assert logits is not None
        assert_close(logits, expected[begin:end])
    for place in range(60, 70):
        assert_close(session.step(caches, tokens[place : place + 1])[0], expected[place])


def test_a_batch_with_idle_sequences_past_the_window(engine: Engine, eager: Gemma3) -> None:
    tokens = [some_tokens(seed, 70) for seed in range(3)]
    expected = [eager_logits(eager, text_tokens(one.tolist())) for one in tokens]
    session, caches = engine.session, engine.session.open_caches(3, 72)
    for sequence, length in ((1, 3), (2, 33), (0, 20)):
        session.extend(caches, sequence, Chunk(token_ids=tokens[sequence][:length]))
    for turn in range(24):
        active = np.array([True, turn % 3 != 0, turn < 9])
        fed = caches.lengths.copy()
        logits = session.step(caches, np.array([one[place] for one, place in zip(tokens, fed, strict=True)]), active)
        for sequence in np.flatnonzero(active):
            assert_close(logits[sequence], expected[sequence][fed[sequence]])
    assert caches.lengths.tolist() == [44, 19, 42]


@pytest.mark.parametrize("chunk", [5, 12, 64])
def test_two_pictures_in_chunks(engine: Engine, eager: Gemma3, chunk: int) -> None:
    tokens, image_ids = some_tokens(9, 50), np.full(50, -1)
    for number, begin in enumerate((10, 37)):
        tokens[begin : begin + 4], image_ids[begin : begin + 4] = 511, number
    pixels = np.random.default_rng(3).standard_normal((2, 3, 56, 56)).astype(np.float32)
    prompt = Prompt(token_ids=tokens, image_ids=image_ids, pixels=pixels)
    features = engine.session.encode_images(pixels)
    caches = engine.session.open_caches(1, 60)
    parts = chunking.chunks(tokens, image_ids, features, chunk)
    logits = [engine.session.extend(caches, 0, part, "all") for part in parts]
    assert_close(np.concatenate(logits), eager_logits(eager, prompt))
    assert_close(engine.session.step(caches, np.array([7]))[0], eager_logits(eager, _longer(prompt, 7))[-1])


def test_greedy_text_is_that_of_the_eager_model(engine: Engine, eager: Gemma3) -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    result = engine.generate("What is in the picture?", images=[picture], max_tokens=20)
    assert engine.tokenizer is not None
    prompt = render(
        [user_message("What is in the picture?", [picture])], engine.tokenizer, engine.session.manifest.model
    )
    begin = len(prompt) - 1
    for token in result.token_ids:
        prompt = _longer(prompt, token)
    logits = eager_logits(eager, prompt)[begin:-1]
    chosen = logits[np.arange(len(result.token_ids)), list(result.token_ids)]
    assert (logits.max(axis=1) - chosen <= TOLERANCE * np.abs(logits).max()).all(), "within rounding of the largest"


def test_a_chat_past_its_windows_equals_one_fed_anew(engine: Engine) -> None:
    chat = engine.conversation(system="Be brief.")
    for text in ("What is a window?", "And then?", "Why?"):
        answer = chat.send(text, max_tokens=9)
    assert answer.stats.cached_tokens > 2 * WINDOW
    assert chat._history is not None
    asked = text_tokens(chat._history.token_ids[: answer.stats.prompt_tokens].tolist())
    assert engine.generate(asked, max_tokens=9).token_ids == answer.token_ids


def test_a_chat_fed_anew_into_used_caches_is_as_good_as_new(engine: Engine) -> None:
    chat = engine.conversation()
    whole = chat.send("What is a window?", max_tokens=12).text
    chat.reset()
    stop = whole[2:5]
    cut = chat.send("What is a window?", max_tokens=12, stop=[stop])
    assert (cut.finish_reason, cut.text) == ("stop", whole[: whole.find(stop)])
    answer = chat.send("And then?", max_tokens=9)
    assert answer.stats.cached_tokens == 0, "the stop string left tokens in windows that had overflowed"
    assert chat._history is not None
    asked = text_tokens(chat._history.token_ids[: answer.stats.prompt_tokens].tolist())
    assert engine.generate(asked, max_tokens=9).token_ids == answer.token_ids


def test_a_batch_writes_what_each_prompt_gets_alone(engine: Engine) -> None:
    prompts = ["One.", "A prompt that is rather longer than the first one was.", "Why?"]
    together = engine.generate_batch(prompts, max_tokens=12)
    assert [one.token_ids for one in together] == [engine.generate(text, max_tokens=12).token_ids for text in prompts]


def test_the_context_can_be_filled_to_the_last_slot(engine: Engine) -> None:
    result = engine.generate(text_tokens(some_tokens(1, CONTEXT - 3).tolist()), max_tokens=50)
    assert (len(result.token_ids), result.finish_reason) == (4, "length")


def _longer(prompt: Prompt, token: int) -> Prompt:
    return Prompt(
        token_ids=np.append(prompt.token_ids, token), image_ids=np.append(prompt.image_ids, -1), pixels=prompt.pixels
    )
