"""Text at token edges: whole characters, and no part of a stop string."""

from __future__ import annotations

import random

import pytest

from runtimes.errors import UsageError
from runtimes.streaming import TextStream


def read(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    stream = TextStream(stop)
    texts = [stream.push(piece) for piece in pieces]
    return [*texts, stream.finish()], stream.stopped_by


def test_a_character_cut_by_tokens_appears_whole() -> None:
    encoded = "né 🦜!".encode()
    texts, _ = read([encoded[i : i + 1] for i in range(len(encoded))])
    assert "".join(texts) == "né 🦜!"
    assert all("\ufffd" not in text for text in texts)
    assert texts[: len("né".encode())] == ["n", "", "é"]


def test_half_a_character_at_the_end_is_replaced() -> None:
    texts, _ = read([b"a", "é".encode()[:1]])
    assert texts == ["a", "", "\ufffd"]


def test_invalid_bytes_do_not_swallow_what_follows() -> None:
    texts, _ = read([b"\xf0\x9f", b"abc"])
    assert "".join(texts) == "\ufffdabc"


def test_a_possible_stop_string_is_held_back_and_then_released() -> None:
    texts, stopped = read([b"one <e", b"nd", b"less>"], ("<end>",))
    assert texts == ["one ", "", "<endless>", ""]
    assert stopped is None


def test_a_stop_string_over_three_tokens_is_never_shown() -> None:
    texts, stopped = read([b"one <e", b"n", b"d> two", b" three"], ("<end>",))
    assert texts == ["one ", "", "", "", ""]
    assert stopped == "<end>"


def test_the_earliest_stop_string_wins() -> None:
    texts, stopped = read([b"alpha beta gamma"], ("gamma", "beta"))
    assert "".join(texts) == "alpha "
    assert stopped == "beta"


def test_what_was_held_comes_out_at_the_end() -> None:
    texts, stopped = read([b"\nUser"], ("\nUser:",))
    assert texts == ["", "\nUser"]
    assert stopped is None


def test_overlapping_beginnings_keep_the_longest() -> None:
    texts, stopped = read([b"aab", b"aab", b"c"], ("aabc",))
    assert "".join(texts) == "aab"
    assert stopped == "aabc"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="must not be empty"):
        TextStream(("a", ""))


@pytest.mark.parametrize("seed", range(30))
def test_any_cut_of_the_bytes_gives_the_text_up_to_the_first_stop(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abé🦜 ") for _ in range(60))
    stop = tuple("".join(rng.choice("abé🦜 ") for _ in range(rng.randint(2, 4))) for _ in range(2))
    encoded, pieces, place = text.encode(), [], 0
    while place < len(encoded):
        size = rng.randint(1, 5)
        pieces.append(encoded[place : place + size])
        place += size
    texts, stopped = read(pieces, stop)
    shown = "".join(texts)
    places = [text.find(one) for one in stop if one in text]
    if places:
        # A stop string is acted on as soon as it is complete, so one that begins later may end first.
        assert stopped is not None and text.startswith(shown + stopped)
        assert not any(one in shown for one in stop)
    else:
        assert (shown, stopped) == (text, None)
