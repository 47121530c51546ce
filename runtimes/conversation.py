"""A chat whose caches stay from turn to turn, so that a turn costs its own tokens only.

Legend: S tokens, N pictures.

What the model wrote stays in the caches as the tokens it wrote. The next turn appends the end of the
model's turn and the user's new one. Where the tokens wanted are not those that the caches hold (after
a stop string cut an answer short), the longest common beginning is kept if the caches can go back to it, and
else the chat is fed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from runtimes.chat import Message, Prompt, render, user_message
from runtimes.errors import UsageError
from runtimes.progress import SILENT, Progress
from runtimes.results import Generation, GenerationOptions, OptionKeywords, Stream
from runtimes.session import Caches

if TYPE_CHECKING:
    from runtimes.engine import Engine
    from runtimes.generation import Writer
    from runtimes.images import ImageSource
    from runtimes.tokenizer import Tokenizer

_ROOM_STEP = 1024


class PrefixCache:
    """Caches of one sequence, and the tokens that they hold.

    Args:
        engine: whose session the caches are of.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._windows = tuple(
            layer.window for layer in engine.session.manifest.model.layers if layer.window is not None
        )
        self._caches: Caches | None = None
        self._held: list[tuple[int, bytes]] = []

    @property
    def tokens(self) -> int:
        """How many tokens the caches hold."""
        return len(self._held)

    def place(self, prompt: Prompt, capacity: int) -> Caches:
        """Caches for ``capacity`` tokens that hold as much of the beginning of ``prompt`` as can be kept.

        At least the last token is left to be fed.
        """
        wanted = _identities(prompt)
        common = _common_length(self._held, wanted)
        if common == len(wanted):
            common -= 1
        if common < len(self._held) and any(len(self._held) > window for window in self._windows):
            common = 0  # a full window has forgotten what lies before it
        while common and prompt.image_ids[common] >= 0 and prompt.image_ids[common] == prompt.image_ids[common - 1]:
            common -= 1  # a picture is fed whole
        caches = self._room(capacity)
        if caches.lengths[0] > common:
            caches.lengths[0] = common
        return caches

    def note(self, tokens: Prompt) -> None:
        """Says what the caches hold: the first tokens of ``tokens``, as many as were fed."""
        assert self._caches is not None
        self._held = _identities(tokens)[: int(self._caches.lengths[0])]

    def drop(self) -> None:
        """Forgets everything: after an error the buffers may be half written."""
        self._caches, self._held = None, []

    def _room(self, capacity: int) -> Caches:
        """The caches with room for ``capacity``; empty ones if they could not grow."""
        engine = self._engine
        if self._caches is not None and self._caches.context >= capacity:
            return self._caches
        wished = -(-capacity // _ROOM_STEP) * _ROOM_STEP
        if self._caches is not None:
            wished = max(wished, 2 * self._caches.context)
        context = min(engine.context, wished)
        if self._caches is None or not engine.session.grow_caches(self._caches, context):
            self._caches = None  # frees the old ones first
            self._caches = engine.session.open_caches(1, context)
        return self._caches


class Conversation:
    """Turns of user and model over one :class:`PrefixCache`.

    Args:
        engine: what writes; it must have a tokenizer.
        system: instructions that come before the first user's text.

    Raises:
        UsageError: the bundle has no tokenizer.
    """

    def __init__(self, engine: Engine, *, system: str | None = None) -> None:
        if engine.tokenizer is None:
            raise UsageError("a conversation needs a tokenizer, but this bundle has none")
        self._engine, self._tokenizer, self._system = engine, engine.tokenizer, system
        self._cache = PrefixCache(engine)
        self._history: Prompt | None = None
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said, in the form that ``generate`` takes."""
        return tuple(self._messages)

    @property
    def tokens(self) -> int:
        """How many tokens the chat has so far."""
        return 0 if self._history is None else len(self._history)

    def reset(self) -> None:
        """Begins anew, with the same instructions."""
        self._cache.drop()
        self._history = None
        del self._messages[1 if self._system else 0 :]

    def send(
        self,
        text: str,
        *,
        images: Sequence[ImageSource] = (),
        pan_and_scan: bool | None = None,
        progress: Progress = SILENT,
        **options: Unpack[OptionKeywords],
    ) -> Generation:
        """The model's answer to a turn of the user; the arguments are those of ``Engine.generate``.

        Raises:
            ContextError: the chat with this turn is longer than the context. It stays as it was.
        """
        return self.stream(text, images=images, pan_and_scan=pan_and_scan, progress=progress, **options).result()

    def stream(
        self,
        text: str,
        *,
        images: Sequence[ImageSource] = (),
        pan_and_scan: bool | None = None,
        progress: Progress = SILENT,
        **options: Unpack[OptionKeywords],
    ) -> Stream:
        """As :meth:`send`, giving text as it becomes certain. A stream that is closed early leaves the answer cut
        short in the chat; one that is never read leaves the chat as it was."""
        chosen = GenerationOptions(**options)
        message = user_message(text, images)
        prompt = self._prompt_with(message, pan_and_scan)
        capacity = self._engine.capacity(len(prompt), chosen)
        return Stream(self._pieces(message, prompt, chosen, capacity, progress))

    def _prompt_with(self, message: Message, pan_and_scan: bool | None) -> Prompt:
        model = self._engine.session.manifest.model
        if self._history is None:
            return render([*self._messages, message], self._tokenizer, model, pan_and_scan=pan_and_scan)
        turn = render([message], self._tokenizer, model, pan_and_scan=pan_and_scan, continuing=True)
        return concatenate(self._history, turn)

    def _pieces(
        self, message: Message, prompt: Prompt, options: GenerationOptions, capacity: int, progress: Progress
    ) -> Generator[str, None, Generation]:
        engine = self._engine
        caches = self._cache.place(prompt, capacity)
        writer = engine.writer(prompt, options, caches)
        try:
            result = yield from engine.write(writer, prompt, caches, progress=progress)
        except GeneratorExit:
            self._remember(message, prompt, writer)
            raise
        except BaseException:
            self._cache.drop()
            raise
        self._remember(message, prompt, writer)
        return result

    def _remember(self, message: Message, prompt: Prompt, writer: Writer) -> None:
        """Appends both turns. The caches hold the tokens written; the chat goes on from what was shown."""
        self._cache.note(concatenate(prompt, text_tokens(writer.token_ids)))
        shown = writer.token_ids
        if writer.finish_reason == "stop":
            shown = tokens_of_text(shown, writer.text, self._tokenizer)
        elif writer.finish_reason == "end":
            shown = shown[:-1]
        self._history = concatenate(prompt, text_tokens(shown))
        self._messages += [message, {"role": "assistant", "content": writer.text}]


def tokens_of_text(token_ids: Sequence[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of ``text``, which is where ``token_ids`` begin: as many of them as fit, the rest encoded anew."""
    wanted, covered, kept, begin = text.encode(), b"", 0, 0
    for place, token in enumerate(token_ids, start=1):
        covered += tokenizer.piece_bytes(token)
        if not wanted.startswith(covered):
            break
        if _is_character_edge(wanted, len(covered)):
            kept, begin = place, len(covered)
    return [*token_ids[:kept], *tokenizer.encode(wanted[begin:].decode())]


def text_tokens(token_ids: Sequence[int]) -> Prompt:
    """Tokens that are all text."""
    ids = np.asarray(token_ids, dtype=np.int64)
    return Prompt(token_ids=ids, image_ids=np.full(len(ids), -1, dtype=np.int64), pixels=None)


def concatenate(first: Prompt, second: Prompt) -> Prompt:
    """One prompt after another; the second one's pictures are numbered on."""
    offset = 0 if first.pixels is None else len(first.pixels)
    moved = np.where(second.image_ids >= 0, second.image_ids + offset, -1)
    pixels = [part.pixels for part in (first, second) if part.pixels is not None]
    return Prompt(
        token_ids=np.concatenate([first.token_ids, second.token_ids]),
        image_ids=np.concatenate([first.image_ids, moved]),
        pixels=np.concatenate(pixels) if pixels else None,
    )


def _identities(prompt: Prompt) -> list[tuple[int, bytes]]:
    """For each token its id and what picture it shows: soft tokens of two pictures have one id."""
    digests = {-1: b""}
    if prompt.pixels is not None:
        for number, pixels in enumerate(prompt.pixels):
            digests[number] = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
    pairs = zip(prompt.token_ids.tolist(), prompt.image_ids.tolist(), strict=True)
    return [(token, digests[image]) for token, image in pairs]


def _is_character_edge(encoded: bytes, place: int) -> bool:
    """Whether no character of UTF-8 lies across ``place``."""
    return place >= len(encoded) or encoded[place] & 0xC0 != 0x80


def _common_length(first: list[tuple[int, bytes]], second: list[tuple[int, bytes]]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
