"""Gemma 3's chat template: messages and pictures to token ids and pixels.

Legend: S tokens, N pictures (crops count one each), T tokens a picture.

The template is written out here, for there is only one. It inserts control ids itself; what users
typed is encoded as text, so a typed ``<end_of_turn>`` ends no turn. A picture becomes what
transformers' ``Gemma3Processor`` makes of it: two newlines, start of image, T soft tokens, end of
image, two newlines; with Pan & Scan, a sentence that introduces the picture and its crops.

Source: the ``chat_template`` of google/gemma-3-4b-it, and transformers/models/gemma3/processing_gemma3.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import UsageError
from runtimes.tokenizer import START_OF_IMAGE, Tokenizer

if TYPE_CHECKING:
    from runtimes.images import ImageSource
    from runtimes.manifest import ImageFacts, ModelFacts

#: ``{"role": "user" | "assistant" | "model" | "system", "content": str | [part, ...]}``, where a part is
#: ``{"type": "text", "text": str}`` or ``{"type": "image", "image": path, bytes, file or Pillow picture}``.
Message: TypeAlias = Mapping[str, Any]

_TEXT = -1  # the image id of a token that is text


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What the decoder is given.

    Attributes:
        token_ids: int64 [S].
        image_ids: int64 [S]; for a soft token the index of its picture in ``pixels``, else -1.
        pixels: float32 [N, 3, size, size], each picture followed by its crops; None without pictures.
    """

    token_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    pixels: NDArray[np.float32] | None

    def __len__(self) -> int:
        """How many tokens the prompt has: S."""
        return int(self.token_ids.shape[0])


def user_message(text: str, images: Sequence[ImageSource] = ()) -> Message:
    """One user turn: pictures first, then the question, as Gemma's model card has it."""
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    model: ModelFacts,
    *,
    pan_and_scan: bool | None = None,
    continuing: bool = False,
    generation: bool = True,
) -> Prompt:
    """Messages in Gemma's chat template.

    Args:
        messages: at most one system message, then user and assistant in turn. The system message is
            put before the first user's text, as the template does. Texts lose outer white space.
        tokenizer: encodes the text.
        model: the bundle's facts; ``model.image`` says how pictures are prepared.
        pan_and_scan: overrides the bundle's own setting.
        continuing: the messages go on with a chat whose tokens are in the caches already, up to but
            without the token that ended the model's turn: the result begins with that token.
        generation: end with the opening of the model's turn.

    Raises:
        UsageError: roles do not alternate, an unknown role or part, an empty message, or a picture
            for a text-only bundle; the message says which.
        ImageError: a picture cannot be read.
    """
    turns, system = _check_roles(messages, continuing=continuing, generation=generation)
    writer = _Writer(tokenizer, model, pan_and_scan=pan_and_scan)
    if continuing:
        writer.control(tokenizer.end_of_turn)
        writer.text("\n")
    else:
        writer.control(tokenizer.tokens.bos)
    for place, message in turns:
        is_user = message["role"] == "user"
        writer.control(tokenizer.start_of_turn)
        writer.text("user\n" if is_user else "model\n")
        writer.text(system)
        system = ""
        _write_content(writer, message["content"], place, may_be_empty=not is_user)
        writer.control(tokenizer.end_of_turn)
        writer.text("\n")
    if generation:
        writer.control(tokenizer.start_of_turn)
        writer.text("model\n")
    return writer.finish()


def complete(
    text: str,
    tokenizer: Tokenizer,
    model: ModelFacts,
    *,
    images: Sequence[ImageSource] = (),
    pan_and_scan: bool | None = None,
    control: bool = False,
) -> Prompt:
    """Raw text to go on with, without the chat template: bos, then the text as it is.

    Pictures come before the text; with ``control``, where ``<start_of_image>`` stands in it.

    Args:
        text: the beginning of a document.
        tokenizer: encodes the text.
        model: the bundle's facts.
        images: pictures, in order.
        pan_and_scan: overrides the bundle's own setting.
        control: read control strings in the text as control tokens (see ``Tokenizer.encode``).

    Raises:
        UsageError: there is neither text nor a picture, a picture for a text-only bundle, or with
            ``control`` not as many ``<start_of_image>`` as pictures.
        ImageError: a picture cannot be read.
    """
    if not text and not images:
        raise UsageError("the prompt is empty", hint="give some text to go on with")
    writer = _Writer(tokenizer, model, pan_and_scan=pan_and_scan, control=control)
    writer.control(tokenizer.tokens.bos)
    pieces = text.split(START_OF_IMAGE) if control and images else [*[""] * len(images), text]
    if len(pieces) != len(images) + 1:
        raise UsageError(
            f"the prompt must hold one {START_OF_IMAGE} for each picture, "
            f"but got (placeholders={len(pieces) - 1}, pictures={len(images)})"
        )
    writer.text(pieces[0])
    for number, (image, after) in enumerate(zip(images, pieces[1:], strict=True)):
        writer.image(image, f"picture {number}")
        writer.text(after)
    return writer.finish()


class _Writer:
    """Collects tokens. Text is held back and encoded in one go, up to the next control token."""

    def __init__(
        self, tokenizer: Tokenizer, model: ModelFacts, *, pan_and_scan: bool | None, control: bool = False
    ) -> None:
        self._tokenizer, self._model, self._pan_and_scan, self._control = tokenizer, model, pan_and_scan, control
        self._token_ids: list[int] = []
        self._image_ids: list[int] = []
        self._pixels: list[NDArray[np.float32]] = []
        self._text: list[str] = []

    def text(self, text: str) -> None:
        self._text.append(text)

    def control(self, token: int) -> None:
        self._flush()
        self._append([token], _TEXT)

    def image(self, source: ImageSource, place: str) -> None:
        """A picture, and its crops where Pan & Scan is on and the picture is long enough."""
        from runtimes.images import load_image, preprocess
        from runtimes.pan_and_scan import crops

        facts = self._model.image
        if facts is None:
            raise UsageError(
                f"{place} is a picture, but this bundle ({self._model.name}) is text-only",
                hint="build a size that sees pictures: 4b, 12b or 27b",
            )
        whole = load_image(source)
        cut = facts.pan_and_scan.enabled if self._pan_and_scan is None else self._pan_and_scan
        parts = crops(whole, facts.pan_and_scan) if cut else []
        self._pixels += [preprocess(picture, facts) for picture in (whole, *parts)]
        first = len(self._pixels) - len(parts) - 1
        if not parts:
            self._block(first, facts)
            return
        self.text("Here is the original image ")
        self._block(first, facts)
        self.text(" and here are some crops to help you see better ")
        for number in range(1, len(parts) + 1):
            self.text(" " if number > 1 else "")
            self._block(first + number, facts)

    def finish(self) -> Prompt:
        self._flush()
        return Prompt(
            token_ids=np.asarray(self._token_ids, np.int64),
            image_ids=np.asarray(self._image_ids, np.int64),
            pixels=np.stack(self._pixels) if self._pixels else None,
        )

    def _block(self, index: int, facts: ImageFacts) -> None:
        tokens = self._tokenizer.tokens
        # ModelFacts vouches for the three ids wherever it has facts about images.
        assert tokens.start_of_image is not None and tokens.image is not None and tokens.end_of_image is not None
        self.text("\n\n")
        self.control(tokens.start_of_image)
        self._append([tokens.image] * facts.tokens_per_image, index)
        self.control(tokens.end_of_image)
        self.text("\n\n")

    def _append(self, ids: list[int], image: int) -> None:
        self._token_ids += ids
        self._image_ids += [image] * len(ids)

    def _flush(self) -> None:
        self._append(self._tokenizer.encode("".join(self._text), control=self._control), _TEXT)
        self._text.clear()


def _check_roles(
    messages: Sequence[Message], *, continuing: bool, generation: bool
) -> tuple[list[tuple[str, Message]], str]:
    """The turns, each with its place for errors, and what goes before the first user's text."""
    for number, message in enumerate(messages):
        _check_form(message, f"message {number}")
    turns = [(f"message {i} ({message['role']})", message) for i, message in enumerate(messages)]
    system = ""
    if turns and turns[0][1]["role"] == "system":
        place, message = turns.pop(0)
        if continuing:
            raise UsageError(f"{place} cannot come in the middle of a chat", hint="begin a new chat")
        system = _system_text(message["content"], place) + "\n\n"
    if not turns:
        raise UsageError("a chat must have a message from the user, but got none", hint="give a prompt")
    for number, (place, message) in enumerate(turns):
        wanted = "assistant" if number % 2 else "user"
        role = "assistant" if message["role"] == "model" else message["role"]
        if role != wanted:
            raise UsageError(
                f"roles must alternate between user and assistant: {place} must be from the {wanted}",
                hint="a system message may only come first" if role == "system" else "merge messages of one role",
            )
    if generation and turns[-1][1]["role"] != "user":
        raise UsageError(f"the last message must be from the user, but got {turns[-1][0]}")
    return turns, system


def _check_form(message: Any, place: str) -> None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise UsageError(f"{place} must be a mapping with `role` and `content`, but got {_show(message)}")
    if message["role"] not in ("user", "assistant", "model", "system"):
        raise UsageError(
            f"{place} must have the role user, assistant, model or system, but got {_show(message['role'])}"
        )


def _system_text(content: Any, place: str) -> str:
    """The system message's text, untrimmed as the template has it."""
    if isinstance(content, str):
        return content
    parts = list(_parts(content, place))
    if any(kind == "image" for kind, _, _ in parts):
        raise UsageError(f"{place} holds a picture, but only a user's message may")
    return "".join(value for _, value, _ in parts)


def _write_content(writer: _Writer, content: Any, place: str, *, may_be_empty: bool) -> None:
    """A message's text and pictures, in order, each text trimmed."""
    parts = [("text", content, place)] if isinstance(content, str) else _parts(content, place)
    if not may_be_empty and not any(kind == "image" or value.strip() for kind, value, _ in parts):
        raise UsageError(f"{place} is empty", hint="give some text, or a picture")
    for kind, value, where in parts:
        if kind == "text":
            writer.text(value.strip())
        elif may_be_empty:
            raise UsageError(f"{where} is a picture, but only a user's message may hold one")
        else:
            writer.image(value, where)


def _parts(content: Any, place: str) -> list[tuple[str, Any, str]]:
    """A content list as (kind, value, place). Raises UsageError naming the part that is wrong."""
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UsageError(f"{place} must have text or a list of parts as content, but got {_show(content)}")
    parts = []
    for number, part in enumerate(content):
        where = f"{place}, part {number}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image"):
            raise UsageError(f"{where} must be of type text or image, but got {_show(kind or part)}")
        if kind not in part:
            raise UsageError(f"{where} must have the field `{kind}`, but has {sorted(map(str, part))}")
        if kind == "text" and not isinstance(part["text"], str):
            raise UsageError(f"{where} must hold a string as `text`, but got {_show(part['text'])}")
        parts.append((str(kind), part[kind], where))
    return parts


def _show(value: object) -> str:
    """A value for an error, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
