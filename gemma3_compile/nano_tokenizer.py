"""The tokenizer of ``nano``: a tiny SentencePiece model with every kind of piece that Gemma's has.

It is written down piece by piece, at fixed ids, from a short text of our own: the same bytes come
out on every host, and no training library's version matters. Merges are learned as byte-pair
encoding does (Sennrich et al., arXiv:1508.07909), ties going to the piece that sorts first.

Layout of the 500 pieces (nano's vocabulary has 512 rows; the image token is row 511):

    0-5       pad, eos, bos, unk, mask, multimodal
    6-24      runs of newlines, spaces and tabs, and some HTML tags: whole pieces, as in Gemma
    25-104    ordinary pieces
    105, 106  start and end of a turn
    107-254   bytes 0x00 to 0x93
    255, 256  start and end of an image
    257-364   bytes 0x94 to 0xFF
    365-499   ordinary pieces
"""

from __future__ import annotations

import string
from collections import Counter
from itertools import pairwise
from typing import Any

NUM_PIECES = 500

_SPACE = "▁"
_CONTROL = {0: "<pad>", 1: "<eos>", 2: "<bos>"}
_UNKNOWN = {3: "<unk>"}
_SPECIAL = {
    4: "<mask>",
    5: "[multimodal]",
    105: "<start_of_turn>",
    106: "<end_of_turn>",
    255: "<start_of_image>",
    256: "<end_of_image>",
}
_RUNS = ["\n" * n for n in range(1, 7)] + [_SPACE * n for n in range(2, 9)] + ["\t", "\t\t"]
_TAGS = ["<b>", "</b>", "<code>", "</code>"]
_BYTE_IDS = [*range(107, 255), *range(257, 365)]

# Every printable ASCII character is a piece, and a space: what else there is comes out of bytes.
_CHARACTERS = sorted(set(string.ascii_letters + string.digits + string.punctuation + _SPACE))

_TEXT = """
A compiler reads one model and writes a bundle that a small program can load and run. The model is
a decoder: it takes the words that came before and says which word is likely to come next. Five of
its layers look at a short window of the text, and then one layer looks at all of it, so that the
cache stays small while the text grows long. A picture is cut into patches, the patches become
tokens, and the tokens of one picture see each other in both directions. The user asks what is in
the picture, and the model answers with the name of the thing, its colour, and where it stands.
Every number that the program gives is held against the number that the first model gave, and if
they part, the layer that parted first is named. There is no other rule for what is right here.
The weather in the north was cold and clear that morning; they were walking along the river, and
the water under the bridge was still. What was the reason for the question? She said that nothing
is as good as an answer which is short, and he thought that this was the best of all answers.
Numbers are read one digit after another. Words are read in parts: the start of a word carries the
space before it, and the end of a word is often one of a few: ing, ed, er, tion, ness, able, ment.
"""


def nano_tokenizer() -> bytes:
    """A serialized SentencePiece ModelProto (BPE with byte fallback, identity normalizer)."""
    from sentencepiece import sentencepiece_model_pb2

    pb: Any = sentencepiece_model_pb2  # its classes are made when it is imported: a type checker sees none
    kind = pb.ModelProto.SentencePiece.Type
    table: dict[int, tuple[str, int]] = {}
    for pieces, piece_kind in (
        (_CONTROL, kind.CONTROL),
        (_UNKNOWN, kind.UNKNOWN),
        (_SPECIAL, kind.USER_DEFINED),
        (dict(enumerate(_RUNS + _TAGS, 6)), kind.USER_DEFINED),
        ({token: f"<0x{value:02X}>" for value, token in enumerate(_BYTE_IDS)}, kind.BYTE),
    ):
        table.update({token: (piece, piece_kind) for token, piece in pieces.items()})
    free = [token for token in range(NUM_PIECES) if token not in table]
    ordinary = [*_learn_merges(len(free) - len(_CHARACTERS)), *_CHARACTERS]
    rank = dict(zip(free, range(len(free)), strict=True))
    table.update({token: (piece, kind.NORMAL) for token, piece in zip(free, ordinary, strict=True)})

    model = pb.ModelProto()
    for token in range(NUM_PIECES):
        piece, piece_kind = table[token]
        # A merge's score is its rank: SentencePiece applies the merge with the highest score first.
        model.pieces.add(piece=piece, score=-float(rank.get(token, 0)), type=piece_kind)
    _describe(model)
    return bytes(model.SerializeToString(deterministic=True))


def _learn_merges(count: int) -> list[str]:
    """The ``count`` most useful merged pieces of the text, in the order in which BPE learns them."""
    words = {tuple(_SPACE + word): n for word, n in Counter(_TEXT.split()).items()}
    learned: list[str] = []
    while len(learned) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, n in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {_merge(symbols, best): n for symbols, n in words.items()}
        piece = "".join(best)
        if piece not in learned:  # two ways of merging may spell the same piece
            learned.append(piece)
    return learned


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        # `merged` never ends in half of a pair that was just joined: a joined symbol differs from both halves.
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def _describe(model: Any) -> None:
    """The settings beside the pieces: Gemma's own."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = 2  # BPE
    trainer.vocab_size = NUM_PIECES
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
