"""Generation over a toy session: feeding, ending, streaming, batches and what bad input gets."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import runtimes
from gemma3_compile.nano_tokenizer import nano_tokenizer
from runtimes.chat import Prompt, complete, render, user_message
from runtimes.conversation import text_tokens
from runtimes.engine import Engine
from runtimes.errors import ContextError, NumericsError, UsageError
from runtimes.results import GenerationOptions
from runtimes.sampling import SamplingOptions, log_normaliser
from runtimes.tokenizer import Tokenizer
from tests.runtimes.manifests import TOKENS, manifest
from tests.runtimes.toy_session import ToySession, toy_logits

END_OF_TURN = 106


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(nano_tokenizer(), TOKENS)


@pytest.fixture
def session() -> ToySession:
    return ToySession(manifest())


@pytest.fixture
def engine(session: ToySession, tokenizer: Tokenizer) -> Engine:
    return Engine(session, tokenizer)


def picture(colour: int = 200, size: tuple[int, int] = (60, 50)) -> Image.Image:
    return Image.new("RGB", size, (colour, colour, colour))


def greedy_by_hand(prompt: list[int], count: int) -> list[int]:
    history = [(token, 0.0) for token in prompt]
    written: list[int] = []
    for _ in range(count):
        written.append(int(toy_logits(history).argmax()))
        history.append((written[-1], 0.0))
    return written


def test_generate_feeds_the_template_and_every_token_once(engine: Engine, tokenizer: Tokenizer) -> None:
    result = engine.generate("What is a window?", max_tokens=7)
    prompt = render([user_message("What is a window?")], tokenizer, engine.session.manifest.model)
    assert list(result.token_ids) == greedy_by_hand(prompt.token_ids.tolist(), 7)
    assert result.text == tokenizer.decode(result.token_ids)
    assert result.finish_reason == "length"


def test_raw_text_has_no_template(engine: Engine, tokenizer: Tokenizer) -> None:
    result = engine.generate("The sky", raw=True, max_tokens=3)
    assert list(result.token_ids) == greedy_by_hand(tokenizer.encode("The sky", bos=True), 3)


def test_messages_and_ready_tokens_are_prompts_too(engine: Engine, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}, {"role": "user", "content": "c"}]
    prompt = render(messages, tokenizer, engine.session.manifest.model)
    assert engine.generate(messages, max_tokens=4).token_ids == engine.generate(prompt, max_tokens=4).token_ids


@pytest.mark.parametrize("chunk", [1, 3, 16, 512])
def test_the_chunk_size_changes_nothing(session: ToySession, tokenizer: Tokenizer, chunk: int) -> None:
    result = Engine(session, tokenizer, chunk=chunk).generate("The words that came before.", max_tokens=5)
    whole = Engine(ToySession(manifest()), tokenizer).generate("The words that came before.", max_tokens=5)
    assert result.token_ids == whole.token_ids
    assert all(len(fed) <= chunk for _, fed, _ in session.chunks)
    assert [rows for _, _, rows in session.chunks] == [None] * (len(session.chunks) - 1) + ["last"]


def test_the_bundle_may_set_the_chunk(tokenizer: Tokenizer) -> None:
    session = ToySession(manifest(settings={"prefill_chunk": 5}))
    Engine(session, tokenizer).generate("The words that came before.", max_tokens=1)
    assert max(len(fed) for _, fed, _ in session.chunks) == 5


def test_pictures_are_encoded_once_and_stand_where_they_belong(engine: Engine, session: ToySession) -> None:
    engine.chunk = 3
    result = engine.generate("What is it?", images=[picture(0), picture(255)], max_tokens=2)
    assert (session.encoded, result.stats.images) == (2, 2)
    features = [feature for _, feature in session.opened[0].histories[0] if feature != 0.0]
    np.testing.assert_allclose(features, [-1, -0.9, -0.8, -0.7, 1, 1.1, 1.2, 1.3], atol=1e-6)


def test_pan_and_scan_adds_crops(engine: Engine, session: ToySession) -> None:
    engine.generate("What is it?", images=[picture(9, (900, 300))], pan_and_scan=True, max_tokens=1)
    assert session.encoded == 4
    engine.generate("What is it?", images=[picture(9, (900, 300))], max_tokens=1)
    assert session.encoded == 5


def test_a_stream_gives_the_text_in_pieces(engine: Engine) -> None:
    stream = engine.stream("Tell me.", max_tokens=9)
    pieces = list(stream)
    assert len(pieces) > 1 and all(pieces)
    assert "".join(pieces) == stream.result().text == engine.generate("Tell me.", max_tokens=9).text


def test_a_stream_never_shows_half_a_character(session: ToySession, engine: Engine, tokenizer: Tokenizer) -> None:
    session.script = [*tokenizer.encode("né🦜"), END_OF_TURN]
    assert list(engine.stream("Bird?")) == ["n", "é", "🦜"]


def test_a_closed_stream_has_no_result(engine: Engine) -> None:
    stream = engine.stream("Tell me.", max_tokens=9)
    next(stream)
    stream.close()
    assert list(stream) == []
    with pytest.raises(UsageError, match="closed before its end"):
        stream.result()


def test_the_end_token_ends_and_leaves_no_text(session: ToySession, engine: Engine, tokenizer: Tokenizer) -> None:
    session.script = [*tokenizer.encode("Yes."), END_OF_TURN, 77]
    result = engine.generate("Is it?")
    assert (result.text, result.finish_reason, result.token_ids[-1]) == ("Yes.", "end", END_OF_TURN)
    assert session.script == [77], "nothing is fed after the end"
    session.script = [40, END_OF_TURN]
    assert engine.generate("Is it?", max_tokens=2).finish_reason == "end"


def test_a_stop_string_ends_and_is_cut_off(session: ToySession, engine: Engine, tokenizer: Tokenizer) -> None:
    session.script = tokenizer.encode("One.\n\nUser: two")
    result = engine.generate("Count.", stop=["User:"])
    assert (result.text, result.finish_reason, result.stop) == ("One.\n\n", "stop", "User:")


def test_a_held_back_beginning_of_a_stop_string_comes_out_at_the_end(
    session: ToySession, engine: Engine, tokenizer: Tokenizer
) -> None:
    session.script = [*tokenizer.encode("One.\nUs"), END_OF_TURN]
    result = engine.generate("Count.", stop=["\nUser:"])
    assert (result.text, result.finish_reason) == ("One.\nUs", "end")


def test_rows_beyond_the_tokenizer_leave_no_text(session: ToySession, engine: Engine) -> None:
    session.script = [511, 505, END_OF_TURN]
    assert engine.generate("What?").text == ""


def test_seeds_repeat_a_sampled_text(engine: Engine) -> None:
    def sampled(seed: int | None) -> runtimes.Generation:
        return engine.generate("Tell me.", max_tokens=12, sampling=SamplingOptions(temperature=1.0, seed=seed))

    assert sampled(1).token_ids == sampled(1).token_ids != sampled(2).token_ids
    free = sampled(None)
    assert sampled(free.seed).token_ids == free.token_ids


def test_logprobs_are_those_of_the_models_logits(engine: Engine, tokenizer: Tokenizer) -> None:
    sampling = SamplingOptions(temperature=0.7, top_k=5, repetition_penalty=1.3, seed=3)
    result = engine.generate("Tell me.", raw=True, max_tokens=4, sampling=sampling, logprobs=3)
    history = [(token, 0.0) for token in tokenizer.encode("Tell me.", bos=True)]
    assert result.logprobs is not None and len(result.logprobs) == 4
    for token, entry in zip(result.token_ids, result.logprobs, strict=True):
        logits = toy_logits(history)
        logprobs = logits - log_normaliser(logits)
        assert (entry.token_id, entry.piece) == (token, tokenizer.piece(token))
        assert entry.logprob == pytest.approx(float(logprobs[token]), abs=1e-5)
        assert [one.token_id for one in entry.top] == np.argsort(-logprobs)[:3].tolist()
        assert entry.top[0].logprob == pytest.approx(float(logprobs.max()), abs=1e-5)
        history.append((token, 0.0))
    assert engine.generate("Tell me.", max_tokens=1, logprobs=0).logprobs[0].top == ()  # type: ignore[index]
    assert engine.generate("Tell me.", max_tokens=1).logprobs is None


def test_a_batch_gives_each_prompt_what_it_gets_alone(session: ToySession, engine: Engine) -> None:
    prompts = ["One.", "A rather longer prompt than the first one.", "Why?"]
    alone = [engine.generate(prompt, max_tokens=6) for prompt in prompts]
    together = engine.generate_batch(prompts, max_tokens=6)
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert [result.text for result in together] == [result.text for result in alone]
    assert session.opened[-1].batch == 3


def test_a_batch_goes_on_when_one_ends(session: ToySession, engine: Engine, tokenizer: Tokenizer) -> None:
    prompts = [complete(text, tokenizer, session.manifest.model) for text in ("One", "Two")]
    session.script = [END_OF_TURN]  # the first prompt's first token
    first, second = engine.generate_batch(prompts, max_tokens=5)
    assert (first.finish_reason, len(first.token_ids)) == ("end", 1)
    assert list(second.token_ids) == greedy_by_hand(prompts[1].token_ids.tolist(), 5)
    assert session.opened[-1].lengths.tolist() == [len(prompts[0]), len(prompts[1]) + 4]


def test_a_sampled_batch_repeats_with_its_seed(engine: Engine) -> None:
    sampling = SamplingOptions(temperature=1.0, seed=5)
    first = engine.generate_batch(["Same.", "Same."], max_tokens=8, sampling=sampling)
    again = engine.generate_batch(["Same.", "Same."], max_tokens=8, sampling=sampling)
    assert [one.token_ids for one in first] == [one.token_ids for one in again]
    assert first[0].token_ids != first[1].token_ids, "equal prompts of a batch draw differently"
    assert first[0].token_ids == engine.generate("Same.", max_tokens=8, sampling=sampling).token_ids


def test_an_empty_batch_is_no_work(engine: Engine, session: ToySession) -> None:
    assert engine.generate_batch([]) == []
    assert not session.opened


def test_stats_add_up(engine: Engine) -> None:
    stats = engine.generate("Tell me.", max_tokens=6).stats
    assert (stats.new_tokens, stats.cached_tokens, stats.images) == (6, 0, 0)
    assert stats.cache_bytes == (stats.prompt_tokens + 6) * 16
    assert 0 < stats.prefill_s <= stats.first_token_s
    assert stats.decode_tokens_per_s is not None and stats.decode_tokens_per_s > 0
    assert stats.prefill_tokens_per_s == stats.prompt_tokens / stats.prefill_s
    assert stats.peak_rss_bytes is None or stats.peak_rss_bytes > 1 << 20


def test_a_prompt_longer_than_the_context_names_both_numbers(session: ToySession, tokenizer: Tokenizer) -> None:
    engine = Engine(session, tokenizer, context=20)
    with pytest.raises(ContextError, match="the prompt has 21 tokens, but the context holds 20") as caught:
        engine.generate(text_tokens(range(10, 31)))
    assert "up to 512" in str(caught.value.hint)
    assert not session.opened


def test_a_prompt_that_fills_the_context_still_gets_one_token(session: ToySession, tokenizer: Tokenizer) -> None:
    engine = Engine(session, tokenizer, context=20)
    result = engine.generate(text_tokens(range(10, 30)), max_tokens=9)
    assert (len(result.token_ids), result.finish_reason) == (1, "length")
    result = engine.generate(text_tokens(range(10, 26)), max_tokens=9)
    assert (len(result.token_ids), result.finish_reason) == (5, "length")
    assert session.opened[-1].lengths.tolist() == [20]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_named_with_their_position(session: ToySession, engine: Engine, bad: float) -> None:
    calls = []

    def spoil(logits: np.ndarray) -> None:
        calls.append(1)
        if len(calls) == 3:
            logits[0, 40] = bad

    session.spoil = spoil
    with pytest.raises(NumericsError, match=r"at position 11 .* 1 values of 512 .* after 2 tokens"):
        engine.generate(text_tokens(range(10, 20)), max_tokens=5)


def test_a_text_only_bundle_refuses_a_picture(tokenizer: Tokenizer) -> None:
    whole = manifest()
    session = ToySession(replace(whole, model=replace(whole.model, image=None)))
    with pytest.raises(UsageError, match="text-only"):
        Engine(session, tokenizer).generate("What?", images=[picture()])


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_an_empty_prompt_is_refused(engine: Engine, prompt: str | list[dict[str, str]]) -> None:
    with pytest.raises(UsageError):
        engine.generate(prompt)


def test_other_misuse_is_refused(engine: Engine, session: ToySession, tokenizer: Tokenizer) -> None:
    empty = Prompt(token_ids=np.zeros(0, np.int64), image_ids=np.zeros(0, np.int64), pixels=None)
    cases = [
        (lambda: engine.generate(empty), "the prompt is empty"),
        (lambda: engine.generate([user_message("a")], raw=True), "cannot be used with them"),
        (lambda: engine.generate([user_message("a")], images=[io.BytesIO()]), "cannot be used with them"),
        (lambda: engine.generate("a", max_tokens=0), "max_tokens >= 1"),
        (lambda: engine.generate("a", logprobs=101), "0 <= logprobs <= 100"),
        (lambda: engine.generate("a", stop="END"), "list of strings"),
        (lambda: engine.generate("a", stop=["x", ""]), "must not be empty"),
        (lambda: Engine(session, tokenizer, context=513), "1 <= context <= 512"),
        (lambda: Engine(session, tokenizer, chunk=0), "chunk >= 1"),
        (lambda: Engine(session, None).generate("a"), "has no tokenizer"),
        (lambda: Engine(session, None).conversation(), "needs a tokenizer"),
    ]
    for call, message in cases:
        with pytest.raises(UsageError, match=message):
            call()


def test_without_a_tokenizer_tokens_come_back(session: ToySession) -> None:
    result = Engine(session, None).generate(text_tokens([2, 40, 41]), max_tokens=4, logprobs=1)
    assert list(result.token_ids) == greedy_by_hand([2, 40, 41], 4)
    assert result.text == ""


def test_closing_the_engine_closes_the_session(session: ToySession, tokenizer: Tokenizer) -> None:
    with Engine(session, tokenizer):
        pass
    assert session.closed


def test_every_public_name_is_there() -> None:
    for name in runtimes.__all__:
        assert getattr(runtimes, name) is not None
    assert runtimes.GenerationOptions is GenerationOptions
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = runtimes.nonsense


def test_importing_runtimes_is_quick_and_brings_nothing() -> None:
    code = (
        "import sys, time; before = time.perf_counter(); import runtimes; took = time.perf_counter() - before;"
        "heavy = {'numpy', 'onnxruntime', 'sentencepiece', 'PIL', 'torch', 'onnx'} & set(sys.modules);"
        "print(took, *heavy)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[1:] == []
    assert float(out[0]) < 0.15
