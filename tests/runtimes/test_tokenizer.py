"""The tokenizer on nano's model: no download and no other library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2

from gemma3_compile.nano_tokenizer import nano_tokenizer
from runtimes.errors import TokenizerError, UsageError
from runtimes.manifest import TokenFacts
from runtimes.tokenizer import Tokenizer
from tests.runtimes.manifests import TOKENS
from tests.runtimes.tokenizer_strings import STRINGS, WITH_CONTROL_STRINGS

proto: Any = sentencepiece_model_pb2  # its classes are made when it is imported


@pytest.fixture(scope="module")
def model() -> bytes:
    return nano_tokenizer()


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> Tokenizer:
    return Tokenizer.from_bytes(model, TOKENS)


def test_every_string_comes_back(tokenizer: Tokenizer) -> None:
    changed = [text for text in STRINGS if tokenizer.decode(tokenizer.encode(text)) != text]
    assert changed == ["\u2581x\u2581"]  # SentencePiece writes a space as this character: it comes back as one


def test_pieces_laid_end_to_end_are_the_text(tokenizer: Tokenizer) -> None:
    for text in STRINGS:
        ids = tokenizer.encode(text, bos=True)
        assert b"".join(tokenizer.piece_bytes(token) for token in ids).decode() == tokenizer.decode(ids)


@pytest.mark.parametrize("text", WITH_CONTROL_STRINGS)
def test_typed_control_strings_stay_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_control(token) for token in ids)
    assert tokenizer.decode(ids) == text


def test_control_strings_are_read_on_request(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<bos>a<end_of_turn><image_soft_token><<eos>", control=True)
    names = [tokenizer.piece(token) for token in ids]
    assert names == ["<bos>", "a", "<end_of_turn>", "<image_soft_token>", "<", "<eos>"]
    assert ids[3] == TOKENS.image
    assert tokenizer.decode(ids) == "a<"
    assert tokenizer.decode(ids, control=True) == "<bos>a<end_of_turn><image_soft_token><<eos>"


def test_a_control_string_that_is_no_piece_is_text_even_then(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<unused7>", control=True) == tokenizer.encode("<unused7>")


def test_bos_is_put_in_front_on_request_only(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a", bos=True) == [TOKENS.bos, *tokenizer.encode("a")]
    assert TOKENS.bos not in tokenizer.encode("a")
    assert tokenizer.encode("") == []


def test_white_space_runs_and_tags_are_whole_pieces(tokenizer: Tokenizer) -> None:
    names = [tokenizer.piece(token) for token in tokenizer.encode("\n\n\n  \t\t<code>")]
    assert names == ["\n\n\n", "▁▁", "\t\t", "<code>"]


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.piece_bytes(ids[0]) == b"\xc3"


def test_rows_beyond_the_pieces_are_silent(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 500
    assert tokenizer.piece_bytes(505) == b"" and tokenizer.piece(505) == "<row 505>"
    assert tokenizer.piece_bytes(511) == b"" and tokenizer.piece(511) == "<image_soft_token>"
    with pytest.raises(TokenizerError, match="0 or more, but got -1"):
        tokenizer.piece_bytes(-1)


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: Tokenizer) -> None:
    text = b"ab\xff".decode("utf-8", errors="surrogateescape")
    with pytest.raises(UsageError, match=r"U\+DCFF\) at character 2") as caught:
        tokenizer.encode(text)
    assert caught.value.hint == "read the text as UTF-8"


def test_from_file_reads_and_names_what_it_cannot_read(tmp_path: Path, model: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    assert Tokenizer.from_file(path, TOKENS).encode("a") == Tokenizer.from_bytes(model, TOKENS).encode("a")
    with pytest.raises(TokenizerError, match=r"missing\.model: No such file"):
        Tokenizer.from_file(tmp_path / "missing.model", TOKENS)
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        Tokenizer.from_file(tmp_path, TOKENS)


@pytest.mark.parametrize("damage", ["empty", "json", "cut", "noise"])
def test_what_is_no_model_is_refused(model: bytes, damage: str) -> None:
    data = {"empty": b"", "json": b'{"model": {}}', "cut": model[:3000], "noise": bytes(range(256)) * 9}[damage]
    with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
        Tokenizer.from_bytes(data, TOKENS)


def test_ids_that_disagree_with_the_manifest_are_refused(model: bytes) -> None:
    with pytest.raises(TokenizerError, match="`<bos>` must be piece 5 of the tokenizer tokenizer, but is piece 2"):
        Tokenizer.from_bytes(model, TokenFacts(bos=5, pad=0, unk=3, end=(1,)))
    with pytest.raises(TokenizerError, match="`<start_of_image>` must be piece 254"):
        Tokenizer.from_bytes(model, TokenFacts(bos=2, pad=0, unk=3, end=(1,), start_of_image=254))


def test_a_model_without_a_turn_piece_is_refused(model: bytes) -> None:
    with pytest.raises(TokenizerError, match="has no piece `<start_of_turn>`"):
        Tokenizer.from_bytes(model.replace(b"<start_of_turn>", b"<start_of_tune>"), TOKENS)


@pytest.mark.parametrize("setting", ["add_dummy_prefix", "remove_extra_whitespaces"])
def test_a_model_that_changes_text_is_refused(model: bytes, setting: str) -> None:
    changed = proto.ModelProto.FromString(model)
    setattr(changed.normalizer_spec, setting, True)
    with pytest.raises(TokenizerError, match="changes text before it splits it"):
        Tokenizer.from_bytes(changed.SerializeToString(), TOKENS)


def test_a_model_without_byte_pieces_is_refused(model: bytes) -> None:
    changed = proto.ModelProto.FromString(model)
    changed.trainer_spec.byte_fallback = False
    for piece in changed.pieces:
        if piece.type == proto.ModelProto.SentencePiece.Type.BYTE:
            piece.type = proto.ModelProto.SentencePiece.Type.NORMAL
    with pytest.raises(TokenizerError, match="has no byte pieces"):
        Tokenizer.from_bytes(changed.SerializeToString(), TOKENS)
