"""Gemma's SentencePiece tokenizer, for an inference host.

Text that a user typed never becomes a control token: ``encode`` breaks a control string such as
``<start_of_turn>`` into ordinary pieces, and only the chat template inserts control ids. Decoding
goes through bytes, so that the pieces of a stream, laid end to end, are the decoded text.

Source: SentencePiece's ModelProto (github.com/google/sentencepiece, src/sentencepiece_model.proto).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.errors import TokenizerError, UsageError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from runtimes.manifest import TokenFacts

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"
START_OF_IMAGE = "<start_of_image>"
END_OF_IMAGE = "<end_of_image>"
IMAGE_SOFT_TOKEN = "<image_soft_token>"

# The strings that steer the model. Runs of white space and HTML tags are whole pieces of Gemma's
# vocabulary too, but they are text: they are not in this list. No control string holds the start
# of another one, so two of them never overlap.
CONTROL = re.compile(
    r"<(?:start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|bos|eos|pad|unk|mask|unused\d+)>"
    r"|\[multimodal\]"
)

_SPACE = "▁"  # how SentencePiece writes a space inside a piece
_PROBE = "  a  b ﬁ\n"  # tells a Gemma normalizer (identity) from one that folds, strips or adds


class Tokenizer:
    """Text to token ids and back.

    Args:
        model: a serialized SentencePiece ModelProto.
        tokens: the ids that the bundle's manifest gives to the special tokens.
        source: what to call the model in errors, for example a file's name.

    Raises:
        TokenizerError: the model cannot be read, normalizes text, lacks byte pieces or a piece of
            Gemma's, or has one of the special pieces at another id than ``tokens`` says.
    """

    def __init__(self, model: bytes, tokens: TokenFacts, *, source: str = "tokenizer") -> None:
        self.tokens = tokens
        self._source = source
        self._pieces = _load(model, source)
        #: How many pieces the SentencePiece model has. The model's own vocabulary may be larger:
        #: it ends in rows for image tokens and in padding.
        self.vocab_size: int = self._pieces.vocab_size()
        self.start_of_turn = self._find(START_OF_TURN)
        self.end_of_turn = self._find(END_OF_TURN)
        self._check()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], tokens: TokenFacts) -> Tokenizer:
        """Read a ``.model`` file. Raises TokenizerError where it cannot be read."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
        return cls(model, tokens, source=str(path))

    @classmethod
    def from_bytes(cls, model: bytes, tokens: TokenFacts) -> Tokenizer:
        """Take a serialized ModelProto."""
        return cls(model, tokens)

    def encode(self, text: str, *, bos: bool = False, control: bool = False) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: any text that UTF-8 can hold.
            bos: put the begin-of-sequence token in front.
            control: read control strings in the text as control tokens, as transformers does.
                Only for text that the caller wrote: whoever types such a string steers the model.

        Raises:
            UsageError: the text holds a lone surrogate, which is what invalid UTF-8 often becomes.
        """
        _check_unicode(text)
        ids = [self.tokens.bos] if bos else []
        start = 0
        for match in CONTROL.finditer(text):
            token = self._control_id(match.group()) if control else None
            if control and token is None:
                continue  # not a piece of this model: plain text
            # Without `control`, cutting behind the first character leaves no whole control string.
            end = match.start() if control else match.start() + 1
            ids += self._pieces.encode(text[start:end])
            start = end
            if token is not None:
                ids.append(token)
                start = match.end()
        ids += self._pieces.encode(text[start:])
        return ids

    def decode(self, ids: Iterable[int], *, control: bool = False) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD.

        Control tokens leave no text, unless ``control`` asks to see them spelled out.
        """
        pieces = (self.piece(i).encode() if control and self.is_control(i) else self.piece_bytes(i) for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def piece_bytes(self, token: int) -> bytes:
        """The bytes that one token adds to the text: none for a control token, or an id beyond the pieces.

        A byte piece adds one byte, so a character may need several tokens: collect bytes, not text.
        """
        if self.is_control(token):
            return b""
        if self._pieces.is_byte(token):
            return bytes([int(self._pieces.id_to_piece(token)[1:-1], 16)])
        return self._pieces.id_to_piece(token).replace(_SPACE, " ").encode()

    def piece(self, token: int) -> str:
        """A token's name, for people: ``▁the``, ``<0x0A>``, ``<end_of_turn>``."""
        self._check_id(token)
        if token < self.vocab_size:
            return str(self._pieces.id_to_piece(token))
        return IMAGE_SOFT_TOKEN if token == self.tokens.image else f"<row {token}>"

    def is_control(self, token: int) -> bool:
        """Whether a token stands for no text: a control token, or a row beyond the pieces."""
        self._check_id(token)
        if token >= self.vocab_size or self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return True
        return CONTROL.fullmatch(self._pieces.id_to_piece(token)) is not None

    def _control_id(self, piece: str) -> int | None:
        """The id of a control string, None where this model has no such token."""
        if piece == IMAGE_SOFT_TOKEN and self.tokens.image is not None:
            return self.tokens.image
        token = int(self._pieces.piece_to_id(piece))
        return token if self._pieces.id_to_piece(token) == piece else None

    def _find(self, piece: str) -> int:
        token = self._control_id(piece)
        if token is None:
            raise TokenizerError(
                f"the tokenizer {self._source} has no piece `{piece}`", hint="give the tokenizer.model of a Gemma 3"
            )
        return token

    def _check_id(self, token: int) -> None:
        if token < 0:
            raise TokenizerError(f"a token id must be 0 or more, but got {token}")

    def _check(self) -> None:
        """Hold the pieces against the manifest's ids, and the normalizer against Gemma's identity."""
        wanted = {"<bos>": self.tokens.bos, "<pad>": self.tokens.pad, "<unk>": self.tokens.unk}
        if self.tokens.start_of_image is not None:
            wanted[START_OF_IMAGE] = self.tokens.start_of_image
        if self.tokens.end_of_image is not None:
            wanted[END_OF_IMAGE] = self.tokens.end_of_image
        for piece, token in wanted.items():
            found = self._find(piece)
            if found != token:
                raise TokenizerError(
                    f"`{piece}` must be piece {token} of the tokenizer {self._source}, but is piece {found}",
                    hint="give the tokenizer that belongs to this checkpoint",
                )
        if not self._pieces.is_byte(self._pieces.piece_to_id("<0x00>")):
            raise TokenizerError(f"the tokenizer {self._source} has no byte pieces, which Gemma's has")
        if self.decode(self._pieces.encode(_PROBE)) != _PROBE:
            raise TokenizerError(
                f"the tokenizer {self._source} changes text before it splits it, which Gemma's does not",
                hint="give the tokenizer.model of a Gemma 3",
            )


def _load(model: bytes, source: str) -> SentencePieceProcessor:
    """Parse a ModelProto. Raises TokenizerError."""
    from sentencepiece import SentencePieceProcessor

    try:
        if not model:
            raise ValueError("it is empty")
        pieces = SentencePieceProcessor(model_proto=model)
        if pieces.vocab_size() < 1:
            raise ValueError("it holds no pieces")
    except (RuntimeError, ValueError, TypeError) as error:
        raise TokenizerError(
            f"the tokenizer {source} is not a SentencePiece model: {error}",
            hint="give a `tokenizer.model` file; a `tokenizer.json` is another format",
        ) from error
    return pieces


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is not valid Unicode: a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}",
            hint="read the text as UTF-8",
        ) from error
