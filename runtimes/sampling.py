"""Which token comes next: penalties, filters and the draw, in numpy.

Legend: V vocabulary, K candidates that a filter leaves.

The order of the filters is transformers': repetition penalty, temperature, top-k, top-p, min-p, and
what is left is renormalised. Sources: CTRL (arXiv 1909.05858) for the penalty, "The curious case
of neural text degeneration" (arXiv 1904.09751) for top-p, arXiv 2407.01082 for min-p.

A vocabulary of 262,144 makes a sort cost tens of milliseconds, so no filter sorts it. The maxima of
strided blocks give a bound that the k largest logits cannot lie below, and only what reaches the bound
is looked at.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import UsageError

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
Floats = TypeVar("Floats", NDArray[np.float32], NDArray[np.float64])

_COLDEST = 1e-3
_BLOCK_ROWS = 64
_NUCLEUS_TRIES = (256, 4096, 32768)
_DRAW_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a token is chosen. The default is greedy: the largest logit.

    Args:
        temperature: what logits are divided by; 0 means greedy, and the filters then change nothing.
        top_k: keep the ``top_k`` largest logits (and ties with the last of them); None keeps all.
        top_p: keep the fewest tokens whose probabilities add up to ``top_p``.
        min_p: keep tokens at least ``min_p`` times as likely as the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of every token that the
            prompt or the text so far holds; 1 means none.
        seed: makes the draw repeatable; None takes a new one, which the result names.

    Raises:
        UsageError: an option is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (
                "temperature",
                self.temperature == 0 or _COLDEST <= self.temperature < math.inf,
                f"temperature == 0 or {_COLDEST} <= temperature < inf",
            ),
            ("top_k", self.top_k is None or self.top_k >= 1, "top_k >= 1"),
            ("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 <= min_p <= 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "0 < repetition_penalty < inf"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "0 <= seed < 2**64"),
        )
        for name, holds, rule in checks:
            if not holds:
                raise UsageError(f"`{rule}` must hold, but got {name}={getattr(self, name)}")

    @classmethod
    def recommended(cls, *, seed: int | None = None) -> SamplingOptions:
        """What the Gemma 3 team recommends: temperature 1, top-k 64, top-p 0.95."""
        return cls(temperature=1.0, top_k=64, top_p=0.95, seed=seed)


class Sampler:
    """Draws the tokens of one sequence.

    Args:
        options: what to draw with.
        vocab_size: V.
        prompt: tokens that the repetition penalty counts as said already.
        stream: number of the sequence in its batch; the same seed and stream repeat the same draws.
    """

    def __init__(self, options: SamplingOptions, vocab_size: int, prompt: Iterable[int] = (), stream: int = 0) -> None:
        self.options = options
        self.seed = secrets.randbits(32) if options.seed is None else options.seed
        self._stream = stream
        self._penalises = options.repetition_penalty != 1.0
        self._seen = np.zeros(vocab_size if self._penalises else 0, dtype=np.bool_)
        if self._penalises:
            self._seen[np.fromiter(prompt, dtype=np.int64)] = True

    @cached_property
    def _random(self) -> np.random.Generator:
        """Made with the first draw: importing numpy's generators costs greedy text a part of its first token."""
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, self._stream], dtype=np.uint64)))

    def pick(self, logits_V: Logits) -> int:
        """The next token for finite ``logits_V`` [V], which are left as they are."""
        options = self.options
        if self._penalises:
            logits_V = _penalised(logits_V, np.flatnonzero(self._seen), options.repetition_penalty)
        if options.temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = self._draw(logits_V)
        if self._penalises:
            self._seen[token] = True
        return token

    def _draw(self, logits_V: Logits) -> int:
        options = self.options
        if options.top_k is None and options.top_p == 1.0 and options.min_p == 0.0:
            return _draw_from_all(_weights(logits_V, logits_V.max(), options.temperature), self._random.random())
        ids_K, weights_K = candidates(logits_V, options)
        cumulative_K = np.cumsum(weights_K)
        place = int(np.searchsorted(cumulative_K, self._random.random() * cumulative_K[-1], side="right"))
        return int(ids_K[min(place, len(ids_K) - 1)])


def candidates(logits_V: Logits, options: SamplingOptions) -> tuple[Ids, NDArray[np.float64]]:
    """What temperature, top-k, top-p and min-p leave of ``logits_V``.

    Returns:
        ids [K] in descending order of their logits (ties: ascending id), and their weights [K], relative
        to the likeliest token's 1; not normalised.
    """
    largest = logits_V.max()
    if options.top_k is not None and options.top_k < len(logits_V):
        ids_K = largest_ids(logits_V, options.top_k)
        weights_K = _weights(logits_V[ids_K].astype(np.float64), largest, options.temperature)
        total = float(weights_K.sum())
    else:
        weights_V = _weights(logits_V, largest, options.temperature)
        total = float(_block_sums(weights_V).sum())
        if options.top_p < 1.0:
            ids_K = _nucleus_ids(weights_V, options.top_p * total)
        else:
            ids_K = _sorted_ids(weights_V, np.flatnonzero(weights_V >= options.min_p))
        weights_K = weights_V[ids_K].astype(np.float64)
    if options.top_p < 1.0:
        before_K = np.cumsum(weights_K) - weights_K
        keep = max(1, int(np.searchsorted(before_K, options.top_p * total, side="left")))
        ids_K, weights_K = ids_K[:keep], weights_K[:keep]
    if options.min_p > 0.0:
        kept_K = weights_K >= options.min_p
        ids_K, weights_K = ids_K[kept_K], weights_K[kept_K]
    return ids_K, weights_K


def largest_ids(values_V: Logits, count: int) -> Ids:
    """Ids of the ``count`` largest values, and of ties with the last; descending, ties by ascending id."""
    ids_K = np.flatnonzero(values_V >= _lower_bound(values_V, count))
    if len(ids_K) > count:
        values_K = values_V[ids_K]
        last = np.partition(values_K, len(values_K) - count)[len(values_K) - count]
        ids_K = ids_K[values_K >= last]
    return _sorted_ids(values_V, ids_K)


def log_normaliser(logits_V: Logits) -> float:
    """log(sum(exp(logits))): what turns logits into log probabilities."""
    largest = logits_V.max()
    return float(largest) + math.log(float(_block_sums(np.exp(logits_V - largest)).sum()))


def all_finite(logits_V: Logits) -> bool:
    """Whether no value is NaN or infinite. A dot product says so seven times as fast as ``isfinite``."""
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.dot(logits_V, logits_V)
    if np.isfinite(square):
        return True
    return bool(np.isfinite(logits_V).all())


def _penalised(logits_V: Logits, seen: Ids, penalty: float) -> Logits:
    logits_V = logits_V.copy()
    said = logits_V[seen]
    logits_V[seen] = np.where(said < 0, said * penalty, said / penalty)
    return logits_V


def _weights(logits: Floats, largest: np.float32, temperature: float) -> Floats:
    """exp((logits - largest) / temperature), which underflows to 0 where it is negligible."""
    with np.errstate(under="ignore"):
        weights: Floats = np.exp((logits - largest) / logits.dtype.type(temperature))
    return weights


def _lower_bound(values_V: Logits, count: int) -> float:
    """A value that at least ``count`` of ``values_V`` reach, and not many more."""
    size = len(values_V)
    columns = size // _BLOCK_ROWS
    if columns < count:
        return float(np.partition(values_V, max(0, size - count))[max(0, size - count)])
    maxima = values_V[: columns * _BLOCK_ROWS].reshape(_BLOCK_ROWS, columns).max(axis=0)
    return float(np.partition(maxima, columns - count)[columns - count])


def _sorted_ids(values_V: NDArray[np.floating], ids_K: Ids) -> Ids:
    return ids_K[np.argsort(-values_V[ids_K], kind="stable")]


def _nucleus_ids(weights_V: Logits, needed: float) -> Ids:
    """Enough of the largest weights, descending, to add up to ``needed``."""
    for count in _NUCLEUS_TRIES:
        if count >= len(weights_V):
            break
        ids_K = largest_ids(weights_V, count)
        if float(weights_V[ids_K].sum(dtype=np.float64)) >= needed:
            return ids_K
    return _sorted_ids(weights_V, np.flatnonzero(weights_V > 0))


def _block_sums(weights_V: Logits) -> NDArray[np.float64]:
    """Sums over runs of neighbours, added up in float64 from there on."""
    return np.add.reduceat(weights_V, np.arange(0, len(weights_V), _DRAW_BLOCK)).astype(np.float64)


def _draw_from_all(weights_V: Logits, uniform: float) -> int:
    """Inverse transform over all weights, a block first and then a token in it."""
    sums = np.cumsum(_block_sums(weights_V))
    target = uniform * sums[-1]
    block = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
    begin = block * _DRAW_BLOCK
    within = np.cumsum(weights_V[begin : begin + _DRAW_BLOCK], dtype=np.float64)
    rest = target - (sums[block - 1] if block else 0.0)
    place = min(int(np.searchsorted(within, rest, side="right")), len(within) - 1)
    return begin + place
