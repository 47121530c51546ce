"""What goes into a generation beside the prompt, and what comes out of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, TypedDict

from runtimes.errors import UsageError
from runtimes.sampling import SamplingOptions

FinishReason = Literal["end", "stop", "length"]
"""``end``: the model ended its turn. ``stop``: a stop string came. ``length``: ``max_tokens``, or the context is full."""

MAX_LOGPROBS = 100


class OptionKeywords(TypedDict, total=False):
    """The fields of :class:`GenerationOptions`, as keywords of ``generate``, ``stream`` and ``send``."""

    max_tokens: int
    sampling: SamplingOptions
    stop: Sequence[str]
    logprobs: int | None


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How long to write, and how.

    Args:
        max_tokens: the most tokens to write; fewer where the context ends before.
        sampling: how each token is chosen; greedy by default.
        stop: strings that end the text. They are not part of it.
        logprobs: also report each token's log probability and this many of the likeliest tokens' (0: only the
            token's own). They are the model's, before penalty, temperature and filters.

    Raises:
        UsageError: an option is out of its range.
    """

    max_tokens: int = 512
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: Sequence[str] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"`max_tokens >= 1` must hold, but got max_tokens={self.max_tokens}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UsageError(f"`0 <= logprobs <= {MAX_LOGPROBS}` must hold, but got logprobs={self.logprobs}")
        if isinstance(self.stop, str):
            raise UsageError(f"`stop` must be a list of strings, but got the string {self.stop!r}")
        if any(not text for text in self.stop):
            raise UsageError("a stop string must not be empty, but got ''", hint="leave `stop` out for no stop strings")


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token, its name (``▁the``), and the natural logarithm of its probability."""

    token_id: int
    piece: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class ChosenLogprob(TokenLogprob):
    """The token that was chosen, and the likeliest ones in its place, likeliest first."""

    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """Counts, times and memory of one generation.

    Args:
        prompt_tokens: the whole prompt, what the caches held already included.
        cached_tokens: how many of them the caches held already.
        new_tokens: tokens written, the one that ended the turn included.
        images: pictures encoded, crops included.
        image_s: seconds in the vision stage.
        prefill_s: seconds for the decoder to read the new part of the prompt.
        first_token_s: seconds from the start, pictures included, to the first token.
        decode_s: seconds from the first token to the last.
        cache_bytes: what the caches take.
        peak_rss_bytes: the most memory this process ever held; None where the system does not say.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    images: int
    image_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    cache_bytes: int
    peak_rss_bytes: int | None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Tokens of the prompt read per second; None if none had to be read."""
        read = self.prompt_tokens - self.cached_tokens
        return read / self.prefill_s if read and self.prefill_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens written per second after the first; None if there was no second."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the model wrote.

    Args:
        text: without the stop string; control tokens leave no text.
        token_ids: every token chosen, the one that ended the turn included.
        finish_reason: why it ended.
        stop: the stop string that ended it, or None.
        logprobs: one entry a token, or None if they were not asked for.
        seed: what repeats the draws; of no meaning for greedy.
        stats: counts, times and memory.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | None
    logprobs: tuple[ChosenLogprob, ...] | None
    seed: int
    stats: GenerationStats


class Stream:
    """Text as it becomes certain, piece by piece; then the whole result.

    >>> stream = engine.stream("Why is the sky blue?")           # doctest: +SKIP
    >>> for piece in stream: print(piece, end="", flush=True)    # doctest: +SKIP
    >>> stream.result().stats.decode_tokens_per_s                # doctest: +SKIP
    """

    def __init__(self, pieces: Generator[str, None, Generation]) -> None:
        self._pieces = pieces
        self._result: Generation | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while True:
            try:
                piece = next(self._pieces)
            except StopIteration as end:
                if end.value is not None:
                    self._result = end.value
                raise StopIteration from None
            if piece:
                return piece

    def result(self) -> Generation:
        """The whole generation; what was not read yet is written first.

        Raises:
            UsageError: the stream was closed, or failed, before its end.
        """
        for _ in self:
            pass
        if self._result is None:
            raise UsageError("the stream was closed before its end, so there is no result")
        return self._result

    def close(self) -> None:
        """Stops writing."""
        self._pieces.close()
