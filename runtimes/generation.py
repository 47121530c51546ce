"""Writing: the tokens of one sequence, from logits to text, until there is a reason to end.

Legend: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import NumericsError
from runtimes.peak_memory import peak_rss_bytes
from runtimes.results import (
    ChosenLogprob,
    FinishReason,
    Generation,
    GenerationOptions,
    GenerationStats,
    TokenLogprob,
)
from runtimes.sampling import Sampler, all_finite, largest_ids, log_normaliser
from runtimes.streaming import TextStream

if TYPE_CHECKING:
    from runtimes.chat import Prompt
    from runtimes.session import Caches
    from runtimes.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Clock:
    """Times of one generation, in seconds, and what was fed in them."""

    began: float = field(default_factory=time.perf_counter)
    cached_tokens: int = 0
    images: int = 0
    image_s: float = 0.0
    prefill_s: float = 0.0
    first_token: float | None = None
    last_token: float | None = None

    def token(self) -> None:
        """Notes that a token was chosen now."""
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token


class Writer:
    """One sequence that is being written.

    Args:
        prompt: what it goes on from.
        options: how, and how long.
        room: the most tokens that the caches leave room for; the last of them need not be fed.
        end_tokens: ids that end the turn.
        vocab_size: V.
        tokenizer: None writes token ids and no text.
        stream: number of the sequence in its batch.
    """

    def __init__(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        room: int,
        end_tokens: Sequence[int],
        vocab_size: int,
        tokenizer: Tokenizer | None,
        stream: int = 0,
    ) -> None:
        self.clock = Clock()
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._prompt_tokens = len(prompt)
        self._limit = min(options.max_tokens, room)
        self._options, self._end, self._tokenizer = options, frozenset(end_tokens), tokenizer
        self._sampler = Sampler(options.sampling, vocab_size, prompt.token_ids, stream)
        self._stream = TextStream(options.stop)
        self._texts: list[str] = []
        self._logprobs: list[ChosenLogprob] = []

    @property
    def text(self) -> str:
        """What has become certain so far."""
        return "".join(self._texts)

    def accept(self, logits_V: NDArray[np.float32]) -> str:
        """Chooses the next token and returns the text that becomes certain with it.

        Raises:
            NumericsError: the logits hold NaN or infinity.
        """
        assert self.finish_reason is None, "the sequence has ended"
        self._check(logits_V)
        token = self._sampler.pick(logits_V)
        self.token_ids.append(token)
        self.clock.token()
        if self._options.logprobs is not None:
            self._logprobs.append(self._logprob(logits_V, token, self._options.logprobs))
        text = ""
        if token in self._end:
            self.finish_reason = "end"
        elif self._tokenizer is not None:
            text = self._stream.push(self._tokenizer.piece_bytes(token))
        if self._stream.stopped_by is not None:
            self.finish_reason = "stop"
        elif self.finish_reason is None and len(self.token_ids) >= self._limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._finish_text()
        self._texts.append(text)
        return text

    def result(self, caches: Caches) -> Generation:
        """The generation, once it has ended."""
        assert self.finish_reason is not None, "the sequence has not ended"
        clock = self.clock
        assert clock.first_token is not None and clock.last_token is not None
        stats = GenerationStats(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=clock.cached_tokens,
            new_tokens=len(self.token_ids),
            images=clock.images,
            image_s=clock.image_s,
            prefill_s=clock.prefill_s,
            first_token_s=clock.first_token - clock.began,
            decode_s=clock.last_token - clock.first_token,
            cache_bytes=caches.bytes_allocated,
            peak_rss_bytes=peak_rss_bytes(),
        )
        return Generation(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stop=self._stream.stopped_by,
            logprobs=None if self._options.logprobs is None else tuple(self._logprobs),
            seed=self._sampler.seed,
            stats=stats,
        )

    def _finish_text(self) -> str:
        """What was held back; a stop string may become complete only here, by half a character."""
        text = self._stream.finish()
        if self._stream.stopped_by is not None:
            self.finish_reason = "stop"
        return text

    def _check(self, logits_V: NDArray[np.float32]) -> None:
        if all_finite(logits_V):
            return
        broken = int((~np.isfinite(logits_V)).sum())
        written = len(self.token_ids)
        raise NumericsError(
            f"the logits at position {self._prompt_tokens + written - 1} hold {int(np.isnan(logits_V).sum())} NaN and "
            f"{broken} values of {len(logits_V)} that are not finite, after {written} tokens were written",
            hint="`gemma3c validate` finds the first layer that drifts; `gemma3c verify` finds damaged weights",
        )

    def _logprob(self, logits_V: NDArray[np.float32], token: int, count: int) -> ChosenLogprob:
        normaliser = log_normaliser(logits_V)

        def one(token_id: int) -> tuple[int, str, float]:
            piece = "" if self._tokenizer is None else self._tokenizer.piece(token_id)
            return token_id, piece, float(logits_V[token_id]) - normaliser

        top = [one(int(i)) for i in largest_ids(logits_V, count)[:count]] if count else []
        token_id, piece, logprob = one(token)
        return ChosenLogprob(
            token_id=token_id,
            piece=piece,
            logprob=logprob,
            top=tuple(TokenLogprob(token_id=i, piece=p, logprob=v) for i, p, v in top),
        )
