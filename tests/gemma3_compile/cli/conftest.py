"""Running ``gemma3c`` in this process, and a stand-in for a loaded bundle."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

import runtimes
from gemma3_compile.cli import run
from runtimes.manifest import Manifest
from runtimes.results import Generation, GenerationStats, Stream
from tests.runtimes.manifests import manifest


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


Gemma3c = Callable[..., Result]


@pytest.fixture
def gemma3c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gemma3c:
    """``gemma3c("verify", "FOLDER", stdin=b"...")``; stdin is no terminal."""

    def invoke(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return invoke


STATS = GenerationStats(
    prompt_tokens=10,
    cached_tokens=2,
    new_tokens=3,
    images=1,
    image_s=0.25,
    prefill_s=0.5,
    first_token_s=1.0,
    decode_s=0.5,
    cache_bytes=2_000_000,
    peak_rss_bytes=300_000_000,
)


def generation(text: str) -> Generation:
    return Generation(
        text=text, token_ids=(5, 6, 7), finish_reason="end", stop=None, logprobs=None, seed=42, stats=STATS
    )


@dataclass
class FakeSession:
    manifest: Manifest


@dataclass
class FakeEngine:
    """Answers with what it was asked, and remembers how it was called."""

    loaded: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    session: FakeSession = field(default_factory=lambda: FakeSession(manifest()))
    error: BaseException | None = None
    closed: bool = False
    chats: int = 0

    def stream(self, prompt: Any, **options: Any) -> Stream:
        self.asked.append((prompt, options))

        def pieces() -> Generator[str, None, Generation]:
            yield "you said "
            if self.error is not None:
                raise self.error
            yield str(prompt)
            return generation(f"you said {prompt}")

        return Stream(pieces())

    def conversation(self, *, system: str | None = None) -> FakeEngine:
        self.chats += 1
        return self

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """What ``runtimes.load`` gives instead of a real engine."""
    fake = FakeEngine()

    def load(path: object, **options: Any) -> FakeEngine:
        fake.loaded = {"path": path, **options}
        return fake

    monkeypatch.setattr(runtimes, "load", load)
    return fake


def last(engine: FakeEngine) -> tuple[Any, dict[str, Any]]:
    """The prompt and options of the last call."""
    return engine.asked[-1]


def lines(text: str) -> Sequence[str]:
    return text.splitlines()
