"""A SentencePiece model rebuilt from the pieces, scores and types in a GGUF file.

The types are ggml's, which are SentencePiece's own numbers. A converter marks the pieces of the chat template
(``<start_of_turn>``) as control pieces, which SentencePiece never finds in text; the original has them as
user-defined, and so they are here. Four pieces stay control or unknown: bos, eos, pad and unk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma3_compile.config import SpecialTokens
from runtimes.errors import CheckpointError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_MODEL_BPE = 2
_PREFIX = "tokenizer.ggml."


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether the file holds a SentencePiece vocabulary (``llama`` in ggml's words)."""
    return metadata.get(_PREFIX + "model") == "llama" and isinstance(metadata.get(_PREFIX + "tokens"), list)


def rebuild(metadata: Mapping[str, Any], tokens: SpecialTokens, source: str) -> bytes | None:
    """Serialized SentencePiece model, None where the file holds no SentencePiece vocabulary.

    Raises CheckpointError where pieces, scores and types do not belong together.
    """
    if not has_tokenizer(metadata):
        return None
    pieces: Sequence[bytes] = metadata[_PREFIX + "tokens"]
    scores, types = (_numbers(metadata.get(_PREFIX + key)) for key in ("scores", "token_type"))
    if not len(pieces) == len(scores) == len(types):
        raise CheckpointError(
            f"{source}: the tokenizer holds {len(pieces)} pieces, {len(scores)} scores and {len(types)} types, "
            "expected as many of each",
            hint="the file is damaged or was written by a faulty converter: convert it again",
        )
    specials = {tokens.bos: _CONTROL, tokens.pad: _CONTROL, tokens.unk: _UNKNOWN}
    # An instruction-tuned file names <end_of_turn> as its eos; SentencePiece's own is the piece <eos>.
    eos = pieces.index(b"<eos>") if b"<eos>" in pieces else tokens.end[0]
    specials[eos] = _CONTROL
    outside = sorted(index for index in specials if not 0 <= index < len(pieces))
    unknown = sorted(set(types) - set(range(_NORMAL, _BYTE + 1)))
    if outside or unknown:
        fault = f"a special id is {outside[0]}" if outside else f"a piece is of type {unknown[0]:g}"
        raise CheckpointError(
            f"{source}: {fault}, but the tokenizer has {len(pieces)} pieces of types {_NORMAL} to {_BYTE}",
            hint="the file is damaged or was written by a faulty converter: convert it again",
        )
    return _serialize(pieces, scores, types, specials, tokens, eos, source)


def _numbers(stored: object) -> list[float]:
    """An array of the metadata as numbers, empty where there is none."""
    return stored.tolist() if isinstance(stored, np.ndarray) else []


def _serialize(
    pieces: Sequence[bytes],
    scores: Sequence[float],
    types: Sequence[float],
    specials: Mapping[int, int],
    tokens: SpecialTokens,
    eos: int,
    source: str,
) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as proto  # brings protobuf: only when a tokenizer is asked for

    model = proto.ModelProto()  # type: ignore[attr-defined]  # generated code without types
    try:
        texts = [piece.decode() for piece in pieces]
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{source}: a piece of the tokenizer is not UTF-8: {error.object!r}", hint="fetch it again"
        ) from error
    for index, (text, score, stored) in enumerate(zip(texts, scores, types, strict=True)):
        kind = specials.get(index, _USER_DEFINED if stored == _CONTROL else int(stored))
        if kind == _USER_DEFINED:
            text = text.replace(" ", "▁")
        model.pieces.add(piece=text, score=float(score) if kind == _NORMAL else 0.0, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = _MODEL_BPE, len(texts)
    trainer.byte_fallback, trainer.split_digits = _BYTE in types, True
    for name, index in (("unk", tokens.unk), ("bos", tokens.bos), ("eos", eos), ("pad", tokens.pad)):
        setattr(trainer, f"{name}_id", index)
        setattr(trainer, f"{name}_piece", texts[index])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    serialized: bytes = model.SerializeToString()
    return serialized
