"""What a bundle and the eager model are both given: token ids, pictures, and where chunks are cut.

Legend: S tokens of a passage, N pictures, T tokens a picture, W window, V vocabulary.

The cases are laid out so that every rule of the model decides something: chunks longer than the window and
shorter than it, decode past the point where the window's cache wraps, sequences of unequal length in one batch,
a picture whose edges are those of its chunk, two pictures in one chunk, a picture across the window's edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtimes import chunking
from runtimes.chat import Prompt
from runtimes.manifest import ModelFacts
from runtimes.session import Chunk
from runtimes.tokenizer import Tokenizer

Ids = NDArray[np.int64]
IdsOf = Callable[[int], Ids]
"""Gives so many token ids of text."""

STEPS = 8
"""Tokens decoded one at a time."""
_ROWS_BYTES = 80 << 20
_LONGEST_CHUNK = 64
_WITHOUT_WINDOW = 64

TEXT = """\
The lighthouse had been dark for eleven years when the letter came. It was addressed to the keeper, and since there
was no keeper the postman gave it to Ada, who lived nearest and who had once, as a girl, carried oil up the stairs.
She read it twice at the kitchen table. A company in the city wished to buy the lamp: not the tower, not the land,
only the great lens with its rings of glass, each ground by hand and each bent to send the light one way. They
offered 4,250 crowns. They asked for the weight, the height, and the number of panes.

def count_panes(rings: list[int]) -> int:
    total = 0
    for ring, panes in enumerate(rings):
        if panes < 1:
            raise ValueError(f"ring {ring} has no panes")
        total += panes
    return total

Permission is granted to any person who obtains a copy of this lens, free of charge, to look through it without
restriction, provided that the above notice is read aloud in all rooms. The lens is provided "as is", without
warranty of any kind. In 1887 there were 16 such lamps on the coast; by 1950, 9; today, 3 (19%).
"Why would they want the number of panes?" asked her brother. Ada put the letter down. "Because", she said, "they
have never seen it. Whoever has stood inside it at night does not count." Then she went up to count them anyway.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Passage:
    """One sequence.

    Args:
        token_ids: int64 [S].
        image_ids: int64 [S], which of the pictures a token belongs to, -1 for text.
        bounds: (from, up to) of each chunk; what follows the last one goes token by token.
    """

    token_ids: Ids
    image_ids: Ids
    bounds: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def steps(self) -> int:
        """How many tokens go one at a time."""
        return len(self) - self.bounds[-1][1]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Bounds of every piece: the chunks, then the single tokens."""
        yield from self.bounds
        for position in range(self.bounds[-1][1], len(self)):
            yield position, position + 1

    def with_steps(self, count: int) -> Passage:
        """The same tokens, the last ``count`` of them one at a time."""
        cut = len(self) - count
        return replace(self, bounds=tuple((begin, min(end, cut)) for begin, end in self.bounds if begin < cut))

    def has_image(self, begin: int, end: int) -> bool:
        """Whether the piece holds tokens of a picture."""
        return bool((self.image_ids[begin:end] >= 0).any())

    def feature_rows(self) -> Ids:
        """int64 [S]: which row of all pictures' features stands at a token, -1 for text."""
        rows = np.full(len(self), -1, dtype=np.int64)
        for picture in np.unique(self.image_ids[self.image_ids >= 0]):
            places = np.flatnonzero(self.image_ids == picture)
            rows[places] = picture * len(places) + np.arange(len(places))
        return rows

    def chunk(self, begin: int, end: int, features_MH: NDArray[np.float32] | None) -> Chunk:
        """The piece as a session takes it; ``features_MH`` are the rows of all pictures."""
        token_ids = self.token_ids[begin:end]
        if not self.has_image(begin, end):
            return Chunk(token_ids=token_ids)
        assert features_MH is not None, "a passage with pictures needs their features"
        rows = self.feature_rows()[begin:end]
        is_image = rows >= 0
        return Chunk(
            token_ids=token_ids,
            features=features_MH[rows[is_image]],
            feature_rows=np.where(is_image, np.cumsum(is_image) - 1, -1),
            image_ids=self.image_ids[begin:end],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Sequences that run as one batch; all have the same number of single steps."""

    name: str
    passages: tuple[Passage, ...]

    def __post_init__(self) -> None:
        assert len({passage.steps for passage in self.passages}) == 1, f"{self.name}: unequal steps"


def ids_of(facts: ModelFacts, tokenizer: Tokenizer | None) -> IdsOf:
    """Text for the cases: tokens of :data:`TEXT` after a bos token, over and over; seeded ids without a tokenizer."""
    tokens = facts.tokens
    if tokenizer is not None:
        text = np.array(tokenizer.encode(TEXT), dtype=np.int64)
    else:
        special = {tokens.bos, tokens.pad, tokens.unk, *tokens.end}
        special |= {t for t in (tokens.start_of_image, tokens.end_of_image, tokens.image) if t is not None}
        ordinary = np.setdiff1d(np.arange(facts.vocab_size), sorted(special))
        text = np.random.default_rng(0).choice(ordinary, size=1024)
    return lambda count: np.concatenate([[tokens.bos], np.resize(text, max(count, 1) - 1)]).astype(np.int64)


def all_rows(facts: ModelFacts, length: int) -> bool:
    """Whether logits of every row of a chunk are compared, or for the sake of memory of the last one only."""
    return length * facts.vocab_size * 4 <= _ROWS_BYTES


def text_cases(
    facts: ModelFacts, ids: IdsOf, tokens: int | None, slack: int = 0, context: int | None = None
) -> tuple[Case, ...]:
    """Prefill in chunks, and decode of a batch: one sequence passes the window, one wraps its cache, one is short.

    Args:
        tokens: limits the prefill.
        slack: how many slots a local layer's cache has beyond its window.
        context: the longest that the bundle takes; None where that is all that the model was made for.
    """
    window = window_of(facts)
    room = (context or facts.max_context) - STEPS
    length = min(tokens or window + min(2 * window, 160), room)
    sizes = (min(window + 1, _LONGEST_CHUNK), 7, min(window, _LONGEST_CHUNK))
    chunks = Case(name="text in chunks", passages=(_text(ids(length), _cut(0, length, sizes)),))
    pasts = (window - 3, window + slack - 3, 5)
    decode = Case(
        name="decode, a batch of three",
        passages=tuple(
            _text(ids(past + STEPS), _cut(0, past, (chunking.DEFAULT_CHUNK,)))
            for past in (min(max(past, 1), length) for past in pasts)
        ),
    )
    return chunks, decode


def image_cases(facts: ModelFacts, ids: IdsOf) -> tuple[Case, ...]:
    """A picture at both edges of a chunk; two pictures in a chunk, the second across the window's edge."""
    assert facts.image is not None
    count, window = facts.image.tokens_per_image, window_of(facts)
    alone = _with_pictures(facts, ids(5 + count + 6 + 2), (5,))
    edges = ((0, 5), (5, 5 + count), (5 + count, 5 + count + 6))
    second = max(window - count // 2, count + 5)
    first, end = second - 3 - count, second + count + 4
    pair = _with_pictures(facts, ids(end + 8 + 2), (first, second))
    bounds = (*_cut(0, first, (_LONGEST_CHUNK,)), (first, end), (end, end + 8))
    return (
        Case(name="a picture at a chunk's edges", passages=(Passage(**alone, bounds=edges),)),
        Case(name="two pictures in a chunk", passages=(Passage(**pair, bounds=bounds),)),
    )


def fitting(cases: Sequence[Case], context: int, chunk: int) -> tuple[Case, ...]:
    """Those whose passages fit a context, and whose chunks, if they hold a picture, are not longer than ``chunk``."""

    def fits(passage: Passage) -> bool:
        pictured = (end - begin for begin, end in passage.bounds if passage.has_image(begin, end))
        return len(passage) <= context and max(pictured, default=0) <= chunk

    return tuple(case for case in cases if all(fits(passage) for passage in case.passages))


def prompt_case(prompt: Prompt, tokens: int | None, first_picture: int) -> Case:
    """A user's prompt, in chunks that cut no picture; its pictures are numbered from ``first_picture`` on."""
    kept = len(prompt) if tokens is None else min(tokens, len(prompt))
    ids = prompt.image_ids
    while 0 < kept < len(prompt) and ids[kept] >= 0 and ids[kept] == ids[kept - 1]:
        kept -= 1  # never into a picture
    kept = kept or len(prompt)
    image_ids = ids[:kept]
    bounds = chunking.split(image_ids, _LONGEST_CHUNK)
    shifted = np.where(image_ids >= 0, image_ids + first_picture, -1)
    passage = Passage(token_ids=prompt.token_ids[:kept], image_ids=shifted, bounds=tuple(bounds))
    return Case(name="the prompt", passages=(passage,))


def window_of(facts: ModelFacts) -> int:
    """The local layers' window; a stand-in where there is none."""
    return min((layer.window for layer in facts.layers if layer.window is not None), default=_WITHOUT_WINDOW)


def noise_pictures(facts: ModelFacts, count: int) -> NDArray[np.float32]:
    """Pixels [N, 3, size, size] in -1 to 1: a seeded pattern that is coarse and fine at once."""
    assert facts.image is not None
    size, generator = facts.image.size, np.random.default_rng(0)
    coarse = generator.uniform(-0.7, 0.7, size=(count, 3, -(-size // 16), -(-size // 16)))
    blocks = coarse.repeat(16, axis=2).repeat(16, axis=3)[:, :, :size, :size]
    return (blocks + generator.uniform(-0.3, 0.3, size=blocks.shape)).astype(np.float32)


def _text(token_ids: Ids, bounds: tuple[tuple[int, int], ...]) -> Passage:
    return Passage(token_ids=token_ids, image_ids=np.full(len(token_ids), -1, dtype=np.int64), bounds=bounds)


def _with_pictures(facts: ModelFacts, token_ids: Ids, places: tuple[int, ...]) -> dict[str, Ids]:
    """``token_ids`` with the tokens of picture i from ``places[i]`` on, and its start and end around them."""
    tokens, count = facts.tokens, facts.image.tokens_per_image if facts.image else 0
    assert tokens.start_of_image is not None and tokens.image is not None and tokens.end_of_image is not None
    image_ids = np.full(len(token_ids), -1, dtype=np.int64)
    for picture, place in enumerate(places):
        token_ids[place - 1] = tokens.start_of_image
        token_ids[place : place + count] = tokens.image
        token_ids[place + count] = tokens.end_of_image
        image_ids[place : place + count] = picture
    return {"token_ids": token_ids, "image_ids": image_ids}


def _cut(begin: int, end: int, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Chunks from ``begin`` to ``end`` whose sizes go round ``sizes``."""
    bounds: list[tuple[int, int]] = []
    while begin < end:
        size = min(sizes[len(bounds) % len(sizes)], end - begin)
        bounds.append((begin, begin + size))
        begin += size
    return tuple(bounds)
