"""``run`` and ``chat`` over a stand-in engine: prompts, options, streams, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from runtimes.errors import ContextError
from runtimes.sampling import SamplingOptions
from tests.gemma3_compile.cli.conftest import FakeEngine, Gemma3c, last, lines


def test_text_goes_to_stdout_and_figures_to_stderr(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    result = gemma3c("run", "nano", "hello", "--stats")
    assert (result.code, result.out) == (0, "you said hello\n")
    for figure in ("read at 16.0 tok/s", "at 4.0 tok/s", "2.00 MB", "300 MB", "seed 42", "1 pictures in 0.25 s"):
        assert figure in result.err
    assert engine.closed


def test_every_option_reaches_the_runtime(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    result = gemma3c(
        *("run", "nano", "hello", "--raw", "--image", "a.png", "--image", "b.png", "--provider", "cpu", "--threads", 3),
        *("--context", 99, "--max-tokens", 7, "--temperature", 0.5, "--top-k", 0, "--top-p", 0.9, "--min-p", 0.1),
        *("--repetition-penalty", 1.5, "--seed", 11, "--stop", "x", "--stop", "y", "--pan-and-scan"),
    )
    assert result.code == 0, result.err
    assert engine.loaded.pop("progress") is not None
    assert engine.loaded == {"path": Path("nano"), "provider": "cpu", "threads": 3, "context": 99}
    prompt, options = last(engine)
    assert prompt == "hello"
    options.pop("progress")
    assert options == {
        "images": (Path("a.png"), Path("b.png")),
        "pan_and_scan": True,
        "raw": True,
        "max_tokens": 7,
        "sampling": SamplingOptions(temperature=0.5, top_k=None, top_p=0.9, min_p=0.1, repetition_penalty=1.5, seed=11),
        "stop": ("x", "y"),
        "logprobs": None,
    }


def test_defaults_are_what_the_gemma_team_recommends(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    gemma3c("run", "nano", "hello")
    _, options = last(engine)
    assert options["sampling"] == SamplingOptions.recommended()
    assert options["raw"] is False
    assert options["pan_and_scan"] is None


def test_thresholds_of_pan_and_scan(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    before = engine.session.manifest.model.image
    assert before is not None
    gemma3c("run", "nano", "hello", "--pan-and-scan-max-num-crops", 9, "--pan-and-scan-min-ratio", 2)
    after = engine.session.manifest.model.image
    assert after is not None
    expected = replace(before.pan_and_scan, max_num_crops=9, min_ratio_to_activate=2.0)
    assert after.pan_and_scan == expected


def test_pan_and_scan_of_a_text_only_bundle_is_refused(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    whole = engine.session.manifest
    engine.session.manifest = replace(whole, model=replace(whole.model, image=None))
    result = gemma3c("run", "nano", "hello", "--pan-and-scan")
    assert (result.code, engine.asked) == (2, [])
    assert "for text only" in result.err


def test_a_system_message_comes_before_the_prompt(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    gemma3c("run", "nano", "hello", "--system", "be brief", "--image", "a.png")
    messages, options = last(engine)
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[1]["content"][0] == {"type": "image", "image": Path("a.png")}
    assert options["images"] == ()


@pytest.mark.parametrize("arguments", [["-"], []])
def test_the_prompt_may_come_from_stdin(gemma3c: Gemma3c, engine: FakeEngine, arguments: list[str]) -> None:
    assert gemma3c("run", "nano", *arguments, stdin="grüße\nzwei\n".encode()).code == 0
    assert last(engine)[0] == "grüße\nzwei"


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([""], b"", "the prompt is empty"),
        (["  \n"], b"", "the prompt is empty"),
        (["-"], b"", "the prompt is empty"),
        (["-"], b"ab\xffcd", "stdin is not valid UTF-8: byte 0xff at offset 2"),
        (["x\udcfe"], b"", "the prompt is not valid UTF-8: byte 0xfe at offset 1"),
        (["x", "--logprobs", "2"], b"", "--logprobs needs --json"),
        (["x", "--raw", "--system", "y"], b"", "--system is for a chat"),
        (["x", "--top-p", "2"], b"", "top_p <= 1"),
        (["x", "--temperature", "nan"], b"", "temperature"),
        (["x", "--stop", ""], b"", "stop string must not be empty"),
    ],
)
def test_bad_input_is_refused_before_the_bundle_is_loaded(
    gemma3c: Gemma3c, engine: FakeEngine, arguments: list[str], stdin: bytes, message: str
) -> None:
    result = gemma3c("run", "nano", *arguments, stdin=stdin)
    assert (result.code, result.out, engine.loaded) == (2, "", {})
    assert message in result.err


def test_json_is_one_object(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    result = gemma3c("run", "nano", "hello", "--json", "--logprobs", 0)
    data = json.loads(result.out)
    assert data["text"] == "you said hello"
    assert data["token_ids"] == [5, 6, 7]
    assert data["stats"]["decode_tokens_per_s"] == 4.0
    assert data["stats"]["prefill_tokens_per_s"] == 16.0
    assert last(engine)[1]["logprobs"] == 0


def test_an_error_in_the_middle_of_a_text_ends_its_line(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    engine.error = ContextError("the prompt has 9 tokens, but the context holds 8", hint="shorten it")
    result = gemma3c("run", "nano", "hello")
    assert (result.code, result.out) == (1, "you said \n")
    assert result.err == "error: the prompt has 9 tokens, but the context holds 8\nhint: shorten it\n"
    assert engine.closed


def test_an_interrupt_ends_with_130(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    engine.error = KeyboardInterrupt()
    result = gemma3c("run", "nano", "hello")
    assert result.code == 130
    assert lines(result.err)[-1] == "interrupted"
    assert engine.closed


# --- chat ---


def test_each_line_is_a_turn(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    result = gemma3c("chat", "nano", stdin=b"one\n\n two \n/quit\nthree\n")
    assert (result.code, result.out) == (0, "you said one\nyou said two\n")
    assert engine.chats == 1


def test_pictures_are_shown_with_the_next_turn_only(gemma3c: Gemma3c, engine: FakeEngine, tmp_path: Path) -> None:
    picture = tmp_path / "a cat.png"
    picture.write_bytes(b"x")
    result = gemma3c("chat", "nano", stdin=f'/image "{picture}"\nlook\nand now\n'.encode())
    assert result.code == 0, result.err
    assert [options["images"] for _, options in engine.asked] == [(picture,), ()]


def test_reset_begins_a_new_chat_and_stats_tell_of_the_last_turn(gemma3c: Gemma3c, engine: FakeEngine) -> None:
    result = gemma3c("chat", "nano", stdin=b"/stats\none\n/stats\n/reset\n/help\n")
    assert (result.code, engine.chats) == (0, 2)
    assert "nothing was written yet" in result.err
    assert "at 4.0 tok/s" in result.err


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"/imge x\n", "'/imge x' is no command of a chat"),
        (b"/image\n", "is no command of a chat"),
        (b"/image /no/such.png\n", "there is no picture /no/such.png"),
        (b'/image "x\n', "cannot be read"),
        (b"one\n\xff\n", "line 2 of stdin is not valid UTF-8"),
    ],
)
def test_over_a_pipe_the_first_error_ends_the_chat(
    gemma3c: Gemma3c, engine: FakeEngine, stdin: bytes, message: str
) -> None:
    result = gemma3c("chat", "nano", stdin=stdin)
    assert result.code == 2
    assert message in result.err


class Terminal:
    """Answers ``input`` from a list, and says that stdin is a terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, typed: list[str]) -> None:
        self.typed = typed
        monkeypatch.setattr("builtins.input", self.input)
        monkeypatch.setattr("gemma3_compile.cli.chat_command.sys", self)
        self.stdin = self

    def isatty(self) -> bool:
        return True

    def input(self, prompt: str) -> str:
        if not self.typed:
            raise EOFError
        return self.typed.pop(0)


def test_at_a_terminal_an_error_is_shown_and_the_chat_goes_on(
    gemma3c: Gemma3c, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Terminal(monkeypatch, ["/nonsense", "one"])
    result = gemma3c("chat", "nano")
    assert result.code == 0
    assert "is no command of a chat" in result.err
    assert "you said one" in result.out


def test_at_a_terminal_an_interrupt_stops_the_answer_only(
    gemma3c: Gemma3c, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Terminal(monkeypatch, ["one"])
    engine.error = KeyboardInterrupt()
    result = gemma3c("chat", "nano")
    assert result.code == 0
    assert "(stopped)" in result.err
