"""The Python API: a bundle, loaded, that writes text, also about pictures.

Legend: B prompts in a batch, V vocabulary, N pictures.

    engine = runtimes.load("bundles/270m")
    print(engine.generate("Why is the sky blue?", max_tokens=64).text)
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias, Unpack

import numpy as np
from numpy.typing import NDArray

from runtimes import chunking
from runtimes.bundle import Bundle
from runtimes.chat import Message, Prompt, complete, render, user_message
from runtimes.errors import ContextError, UsageError
from runtimes.generation import Writer
from runtimes.progress import SILENT, Progress
from runtimes.results import Generation, GenerationOptions, OptionKeywords, Stream
from runtimes.session import Caches, Provider, Session, open_session
from runtimes.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtimes.conversation import Conversation
    from runtimes.images import ImageSource

PromptLike: TypeAlias = str | Sequence[Message] | Prompt
"""Text for one user turn, a chat's messages, or tokens that are ready."""


class Engine:
    """Generation over a session.

    Args:
        session: a loaded bundle; the engine closes it.
        tokenizer: None where the bundle has none: prompts are then :class:`Prompt` objects, and results token ids.
        context: the most tokens of prompt and answer together; None takes the bundle's own limit.
        chunk: tokens of a prompt that go through the decoder at once; None takes the bundle's setting.

    Raises:
        UsageError: ``context`` or ``chunk`` is out of range.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer | None, *, context: int | None = None, chunk: int | None = None
    ) -> None:
        model = session.manifest.model
        self.session, self.tokenizer = session, tokenizer
        longest = session.max_context
        self.context = longest if context is None else context
        if not 1 <= self.context <= longest:
            built = (
                f"build the bundle again with --context {context}"
                if longest < self.context <= model.max_context
                else None
            )
            raise UsageError(f"`1 <= context <= {longest}` must hold, but got context={context}", hint=built)
        self.chunk = (
            int(session.manifest.settings.get("prefill_chunk", chunking.DEFAULT_CHUNK)) if chunk is None else chunk
        )
        if self.chunk < 1:
            raise UsageError(f"`chunk >= 1` must hold, but got chunk={chunk}")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        provider: Provider = "auto",
        threads: int | None = None,
        context: int | None = None,
        chunk: int | None = None,
        progress: Progress = SILENT,
    ) -> Self:
        """Loads the bundle at ``path``; the other arguments are those of the class and of ``open_session``."""
        bundle = Bundle.open(path)
        facts = bundle.manifest.tokenizer
        tokenizer = None
        if facts is not None:
            tokenizer = Tokenizer.from_file(bundle.path(facts.file), bundle.manifest.model.tokens)
        session = open_session(bundle, provider=provider, threads=threads, progress=progress)
        return cls(session, tokenizer, context=context, chunk=chunk)

    def generate(
        self,
        prompt: PromptLike,
        *,
        images: Sequence[ImageSource] = (),
        pan_and_scan: bool | None = None,
        raw: bool = False,
        progress: Progress = SILENT,
        **options: Unpack[OptionKeywords],
    ) -> Generation:
        """Writes on from a prompt.

        Args:
            prompt: text for one user turn, messages of a chat, or a :class:`Prompt`.
            images: pictures before the text: paths, bytes, files or Pillow pictures.
            pan_and_scan: also show crops of long pictures; None as the bundle says.
            raw: go on with the text as it is, without the chat template.
            progress: is told of the prompt's tokens.
            options: the fields of :class:`GenerationOptions`.

        Raises:
            UsageError: an empty prompt, an option out of range, or a picture for a text-only bundle.
            ImageError: a picture cannot be read.
            ContextError: the prompt is longer than the context.
            NumericsError: the logits hold NaN or infinity.
        """
        return self.stream(
            prompt, images=images, pan_and_scan=pan_and_scan, raw=raw, progress=progress, **options
        ).result()

    def stream(
        self,
        prompt: PromptLike,
        *,
        images: Sequence[ImageSource] = (),
        pan_and_scan: bool | None = None,
        raw: bool = False,
        progress: Progress = SILENT,
        **options: Unpack[OptionKeywords],
    ) -> Stream:
        """As :meth:`generate`, giving text as it becomes certain. Bad arguments raise here, not later."""
        chosen = GenerationOptions(**options)
        ready = self.prepare(prompt, images=images, pan_and_scan=pan_and_scan, raw=raw)
        capacity = self.capacity(len(ready), chosen)

        def pieces() -> Generator[str, None, Generation]:
            caches = self.session.open_caches(1, capacity)
            return (yield from self.write(self.writer(ready, chosen, caches), ready, caches, progress=progress))

        return Stream(pieces())

    def generate_batch(
        self, prompts: Sequence[PromptLike], *, raw: bool = False, **options: Unpack[OptionKeywords]
    ) -> list[Generation]:
        """Writes on from several prompts at once, each decoded at its own position.

        A prompt's text is what :meth:`generate` gives for it: the draws of sequence i repeat with the same seed
        and place in the batch.

        Raises:
            as :meth:`generate`.
        """
        chosen = GenerationOptions(**options)
        ready = [self.prepare(prompt, raw=raw) for prompt in prompts]
        if not ready:
            return []
        caches = self.session.open_caches(len(ready), max(self.capacity(len(one), chosen) for one in ready))
        writers = []
        for number, prompt in enumerate(ready):
            writers.append(self.writer(prompt, chosen, caches, stream=number))
            writers[-1].accept(self.feed(writers[-1], prompt, caches, sequence=number))
        active_B = np.array([writer.finish_reason is None for writer in writers])
        while active_B.any():
            last_B = np.array([writer.token_ids[-1] for writer in writers], dtype=np.int64)
            logits_BV = self.session.step(caches, last_B, active_B)
            for number in np.flatnonzero(active_B).tolist():
                writers[number].accept(logits_BV[number])
                active_B[number] = writers[number].finish_reason is None
        return [writer.result(caches) for writer in writers]

    def conversation(self, *, system: str | None = None) -> Conversation:
        """A chat that keeps its caches from turn to turn.

        Args:
            system: instructions that come before the first user's text.
        """
        from runtimes.conversation import Conversation

        return Conversation(self, system=system)

    def prepare(
        self,
        prompt: PromptLike,
        *,
        images: Sequence[ImageSource] = (),
        pan_and_scan: bool | None = None,
        raw: bool = False,
    ) -> Prompt:
        """Token ids and pixels of a prompt; the arguments are those of :meth:`generate`."""
        if isinstance(prompt, Prompt):
            if not len(prompt):
                raise UsageError("the prompt is empty", hint="give at least one token")
            return prompt
        if self.tokenizer is None:
            raise UsageError("this bundle has no tokenizer, so a prompt must be given as token ids")
        model = self.session.manifest.model
        if raw:
            if not isinstance(prompt, str):
                raise UsageError("messages need the chat template, so `raw` cannot be used with them")
            return complete(prompt, self.tokenizer, model, images=images, pan_and_scan=pan_and_scan)
        if isinstance(prompt, str):
            prompt = [user_message(prompt, images)]
        elif images:
            raise UsageError("pictures of a chat belong into its messages, so `images` cannot be used with them")
        return render(prompt, self.tokenizer, model, pan_and_scan=pan_and_scan)

    def capacity(self, prompt_tokens: int, options: GenerationOptions) -> int:
        """Slots that a prompt and its answer need, as far as the context goes.

        Raises:
            ContextError: the prompt alone is longer than the context.
        """
        if prompt_tokens > self.context:
            loadable, longest = self.session.max_context, self.session.manifest.model.max_context
            more = "this is all that the model was made for"
            if self.context < loadable:
                more = f"or load with a context of up to {loadable}"
            elif self.context < longest:
                more = f"or build the bundle again with a --context of up to {longest}"
            raise ContextError(
                f"the prompt has {prompt_tokens} tokens, but the context holds {self.context}",
                hint=f"shorten the prompt{':' if self.context == longest else ','} {more}",
            )
        return min(self.context, prompt_tokens + options.max_tokens)

    def writer(self, prompt: Prompt, options: GenerationOptions, caches: Caches, stream: int = 0) -> Writer:
        """The state of writing on from ``prompt``. Its clock starts now."""
        model = self.session.manifest.model
        return Writer(
            prompt,
            options,
            room=caches.context - len(prompt) + 1,  # the last token is written, but not fed
            end_tokens=model.tokens.end,
            vocab_size=model.vocab_size,
            tokenizer=self.tokenizer,
            stream=stream,
        )

    def write(
        self, writer: Writer, prompt: Prompt, caches: Caches, *, progress: Progress = SILENT
    ) -> Generator[str, None, Generation]:
        """Feeds what ``caches`` do not hold of ``prompt``, then writes until the end, on sequence 0."""
        yield writer.accept(self.feed(writer, prompt, caches, progress=progress))
        last_1 = np.zeros(1, dtype=np.int64)
        while writer.finish_reason is None:
            last_1[0] = writer.token_ids[-1]
            yield writer.accept(self.session.step(caches, last_1)[0])
        return writer.result(caches)

    def feed(
        self, writer: Writer, prompt: Prompt, caches: Caches, *, sequence: int = 0, progress: Progress = SILENT
    ) -> NDArray[np.float32]:
        """Feeds ``prompt`` from where ``caches`` end; returns the logits [V] of its last token."""
        begin = int(caches.lengths[sequence])
        assert begin < len(prompt), "the last token must be fed to have its logits"
        clock = writer.clock
        clock.cached_tokens = begin
        features = self._features(writer, prompt, begin)
        started = time.perf_counter()
        logits = None
        parts = chunking.chunks(prompt.token_ids, prompt.image_ids, features, self.chunk, begin)
        with progress.task("reading the prompt", total=len(prompt) - begin, unit="tokens") as advance:
            for chunk in parts:
                is_last = caches.lengths[sequence] + len(chunk) == len(prompt)
                logits = self.session.extend(caches, sequence, chunk, "last" if is_last else None)
                advance(len(chunk))
        clock.prefill_s = time.perf_counter() - started
        assert logits is not None
        logits_V: NDArray[np.float32] = logits[0]
        return logits_V

    def _features(self, writer: Writer, prompt: Prompt, begin: int) -> NDArray[np.float32] | None:
        """Feature rows of the pictures from token ``begin`` on, in order."""
        ids = prompt.image_ids[begin:]
        wanted = np.unique(ids[ids >= 0])
        if not len(wanted):
            return None
        assert prompt.pixels is not None, "a prompt with picture tokens has pixels"
        started = time.perf_counter()
        features = self.session.encode_images(prompt.pixels[wanted])
        writer.clock.images, writer.clock.image_s = len(wanted), time.perf_counter() - started
        return features

    def close(self) -> None:
        """Lets go of the session."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
