"""A chat keeps its caches: each turn feeds its own tokens, and the text is that of a chat fed anew."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gemma3_compile.nano_tokenizer import nano_tokenizer
from runtimes.chat import Prompt
from runtimes.conversation import concatenate, text_tokens, tokens_of_text
from runtimes.engine import Engine
from runtimes.errors import ContextError, NumericsError
from runtimes.tokenizer import Tokenizer
from tests.runtimes.manifests import TOKENS, manifest
from tests.runtimes.toy_session import ToyCaches, ToySession

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


def fed(session: ToySession) -> list[int]:
    """Every token that went through ``extend``, in order."""
    return [token for _, chunk, _ in session.chunks for token in chunk.token_ids.tolist()]


def held(session: ToySession) -> list[int]:
    caches = session.opened[-1]
    assert isinstance(caches, ToyCaches)
    return [token for token, _ in caches.histories[0][: int(caches.lengths[0])]]


def spell(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, control=True)


def test_a_turn_feeds_only_its_own_tokens(session: ToySession, engine: Engine, tokenizer: Tokenizer) -> None:
    chat = engine.conversation(system="Be brief.")
    session.script = [*tokenizer.encode("A box."), END_OF_TURN]
    first = chat.send("What is it?")
    assert first.stats.cached_tokens == 0
    session.chunks.clear()
    session.script = [*tokenizer.encode("Red."), END_OF_TURN]
    second = chat.send("Its colour?")
    assert spell(tokenizer, fed(session)) == (
        "<end_of_turn>\n<start_of_turn>user\nIts colour?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert spell(tokenizer, held(session)) == (
        "<bos><start_of_turn>user\nBe brief.\n\nWhat is it?<end_of_turn>\n<start_of_turn>model\nA box.<end_of_turn>\n"
        "<start_of_turn>user\nIts colour?<end_of_turn>\n<start_of_turn>model\nRed."
    )
    assert second.stats.prompt_tokens - second.stats.cached_tokens == len(fed(session))
    assert len(session.opened) == 1
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[2]["content"] == "A box."


def test_an_answer_cut_by_its_length_goes_on_whole(session: ToySession, engine: Engine, tokenizer: Tokenizer) -> None:
    chat = engine.conversation()
    session.script = tokenizer.encode("A box.")
    cut = chat.send("What is it?", max_tokens=3)
    assert cut.finish_reason == "length"
    session.chunks.clear()
    session.script = [END_OF_TURN]
    chat.send("And?")
    assert fed(session)[0] == cut.token_ids[-1], "the last token was written but not fed yet"
    assert spell(tokenizer, held(session)).count("model\n" + cut.text + "<end_of_turn>\n<start_of_turn>user\nAnd?") == 1


@pytest.mark.parametrize(("window", "kept"), [(500, True), (16, False)])
def test_after_a_stop_string_the_chat_goes_on_from_what_was_shown(
    tokenizer: Tokenizer, window: int, kept: bool
) -> None:
    layer = manifest().model.layers
    layers = tuple(type(one)(**{**one.__dict__, "window": window}) if one.window else one for one in layer)
    model = manifest().model
    session = ToySession(manifest(model=type(model)(**{**model.__dict__, "layers": layers})), window=window)
    chat = Engine(session, tokenizer).conversation()
    session.script = tokenizer.encode("A box. STOP now")
    assert chat.send("What is it?", stop=["STOP"]).text == "A box. "
    session.script = [END_OF_TURN]
    again = chat.send("And?")
    assert spell(tokenizer, held(session)).count("model\nA box. <end_of_turn>\n<start_of_turn>user\nAnd?") == 1
    assert "STOP" not in spell(tokenizer, held(session))
    assert (again.stats.cached_tokens > 0) is kept


def test_the_answer_equals_that_of_a_chat_fed_anew(session: ToySession, engine: Engine, tokenizer: Tokenizer) -> None:
    chat = engine.conversation()
    answers = [chat.send(text, max_tokens=5) for text in ("One?", "Two?", "Three?")]
    tokens = held(session)[: answers[-1].stats.prompt_tokens]
    fresh = Engine(ToySession(manifest()), tokenizer).generate(text_tokens(tokens), max_tokens=5)
    assert fresh.token_ids == answers[-1].token_ids


def test_pictures_in_two_turns_are_encoded_once_each(session: ToySession, engine: Engine) -> None:
    chat = engine.conversation()
    chat.send("First?", images=[Image.new("RGB", (8, 8), "white")], max_tokens=2)
    chat.send("Second?", images=[Image.new("RGB", (8, 8), "black")], max_tokens=2)
    chat.send("Both?", max_tokens=2)
    assert session.encoded == 2
    caches = session.opened[-1]
    assert isinstance(caches, ToyCaches)
    features = [feature for _, feature in caches.histories[0] if feature]
    np.testing.assert_allclose(features, [1, 1.1, 1.2, 1.3, -1, -0.9, -0.8, -0.7], atol=1e-6)


@pytest.mark.parametrize("can_grow", [True, False])
def test_caches_grow_with_the_chat(tokenizer: Tokenizer, can_grow: bool) -> None:
    model = manifest().model
    roomy = manifest(model=type(model)(**{**model.__dict__, "max_context": 4000}))
    session = ToySession(roomy, can_grow=can_grow)
    chat = Engine(session, tokenizer).conversation()
    chat.send("One?", max_tokens=3)
    assert session.opened[0].context == 1024
    answer = chat.send("word " * 700, max_tokens=500)
    assert session.opened[-1].context >= answer.stats.prompt_tokens + 500
    assert len(session.opened) == (1 if can_grow else 2)
    assert (answer.stats.cached_tokens > 0) is can_grow
    tokens = held(session)[: answer.stats.prompt_tokens]
    fresh = Engine(ToySession(roomy), tokenizer).generate(text_tokens(tokens), max_tokens=500)
    assert fresh.token_ids == answer.token_ids


def test_a_turn_that_does_not_fit_leaves_the_chat_as_it_was(session: ToySession, tokenizer: Tokenizer) -> None:
    chat = Engine(session, tokenizer, context=60).conversation()
    chat.send("One?", max_tokens=3)
    before = (chat.messages, chat.tokens, held(session))
    with pytest.raises(ContextError, match=r"the prompt has \d+ tokens, but the context holds 60"):
        chat.send("word " * 60)
    assert (chat.messages, chat.tokens, held(session)) == before
    session.script = [END_OF_TURN]
    assert chat.send("Two?").stats.cached_tokens > 0


def test_a_stream_closed_early_leaves_the_answer_cut_short(
    session: ToySession, engine: Engine, tokenizer: Tokenizer
) -> None:
    chat = engine.conversation()
    session.script = tokenizer.encode("one two three four")
    stream = chat.stream("Count.")
    shown = next(stream) + next(stream)
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": shown}
    session.script = [END_OF_TURN]
    assert chat.send("Go on.").stats.cached_tokens > 0
    assert f"model\n{shown}<end_of_turn>\n<start_of_turn>user\nGo on." in spell(tokenizer, held(session))


def test_a_stream_never_read_leaves_the_chat_as_it_was(engine: Engine) -> None:
    chat = engine.conversation()
    chat.stream("Count.").close()
    assert chat.messages == ()
    assert chat.tokens == 0


def test_after_an_error_the_chat_is_fed_anew(session: ToySession, engine: Engine) -> None:
    chat = engine.conversation()
    chat.send("One?", max_tokens=3)
    session.spoil = lambda logits: logits.fill(np.nan)
    with pytest.raises(NumericsError):
        chat.send("Two?", max_tokens=3)
    session.spoil = None
    assert len(chat.messages) == 2
    again = chat.send("Two?", max_tokens=3)
    assert again.stats.cached_tokens == 0
    assert again.stats.prompt_tokens > 20


def test_reset_begins_anew_with_the_instructions(session: ToySession, engine: Engine) -> None:
    chat = engine.conversation(system="Be brief.")
    first = chat.send("One?", max_tokens=3)
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]
    again = chat.send("One?", max_tokens=3)
    assert (again.token_ids, again.stats.cached_tokens) == (first.token_ids, 0)


@pytest.mark.parametrize("text", ["", "A ", "A b", "né🦜 tail", "néx"])
def test_tokens_of_a_shown_text_spell_it(tokenizer: Tokenizer, text: str) -> None:
    written = tokenizer.encode("A box né🦜 tail and more")
    tokens = tokens_of_text(written, text, tokenizer)
    assert tokenizer.decode(tokens) == text
    written = tokenizer.encode(text + "STOP")
    kept = tokens_of_text(written, text, tokenizer)
    assert tokenizer.decode(kept) == text
    if text:
        assert kept[0] == written[0]


def test_tokens_of_a_shown_text_with_half_characters(tokenizer: Tokenizer) -> None:
    byte = {tokenizer.piece_bytes(token): token for token in range(107, 365) if token not in (255, 256)}
    # Two bytes of U+FFFD's own three, then a letter: shown as U+FFFD, whose third byte no token wrote.
    written = [byte[b"\xef"], byte[b"\xbf"], *tokenizer.encode("aSTOP")]
    text = tokenizer.decode(written).removesuffix("STOP")
    assert text == "\ufffda"
    assert tokenizer.decode(tokens_of_text(written, text, tokenizer)) == text


def test_concatenation_numbers_pictures_on() -> None:
    def shown(value: float) -> Prompt:
        ids = np.array([5, 511, 511, 511, 511, 6])
        image_ids = np.array([-1, 0, 0, 0, 0, -1])
        return Prompt(token_ids=ids, image_ids=image_ids, pixels=np.full((1, 3, 2, 2), value, np.float32))

    both = concatenate(concatenate(shown(1), text_tokens([9])), shown(2))
    assert both.image_ids.tolist() == [-1, 0, 0, 0, 0, -1, -1, -1, 1, 1, 1, 1, -1]
    assert both.pixels is not None and both.pixels[:, 0, 0, 0].tolist() == [1, 2]
