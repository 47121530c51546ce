"""nano's tokenizer: where its pieces lie, and that it is the same everywhere."""

from __future__ import annotations

import hashlib

import pytest
from sentencepiece import SentencePieceProcessor

from gemma3_compile.nano_tokenizer import NUM_PIECES, nano_tokenizer


@pytest.fixture(scope="module")
def pieces() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=nano_tokenizer())


def test_special_pieces_lie_where_the_preset_expects_them(pieces: SentencePieceProcessor) -> None:
    places = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 105: "<start_of_turn>", 106: "<end_of_turn>"}
    places |= {255: "<start_of_image>", 256: "<end_of_image>"}
    assert {token: pieces.id_to_piece(token) for token in places} == places
    assert pieces.vocab_size() == NUM_PIECES == 500
    assert (pieces.pad_id(), pieces.eos_id(), pieces.bos_id(), pieces.unk_id()) == (0, 1, 2, 3)


def test_the_preset_has_room_for_it() -> None:
    from gemma3_compile.presets import preset

    nano = preset("nano")
    assert nano.text.vocab_size >= NUM_PIECES
    assert nano.tokens.image is not None and nano.tokens.image >= NUM_PIECES
    assert (nano.tokens.bos, nano.tokens.pad, nano.tokens.unk) == (2, 0, 3)
    assert (nano.tokens.start_of_image, nano.tokens.end_of_image, nano.tokens.end) == (255, 256, (1, 106))


def test_every_piece_stands_once_and_all_bytes_are_there(pieces: SentencePieceProcessor) -> None:
    names = [pieces.id_to_piece(token) for token in range(NUM_PIECES)]
    assert len(set(names)) == NUM_PIECES
    assert sum(pieces.is_byte(token) for token in range(NUM_PIECES)) == 256
    assert all(f"<0x{value:02X}>" in names for value in range(256))


def test_merges_are_used(pieces: SentencePieceProcessor) -> None:
    assert pieces.encode("the model and the picture", out_type=str) == ["th", "e", "▁model", "▁and", "▁the", "▁picture"]
    assert pieces.encode("12", out_type=str) == ["1", "2"]


def test_every_merged_piece_can_come_out(pieces: SentencePieceProcessor) -> None:
    """A merge with a score out of order would never be reached: nearly all spell themselves."""
    merged = [t for t in (*range(25, 105), *range(365, 405)) if len(pieces.id_to_piece(t)) > 1]
    reached = [t for t in merged if pieces.encode(pieces.id_to_piece(t).replace("▁", " ")) == [t]]
    assert len(reached) >= 0.9 * len(merged)


def test_the_bytes_are_the_same_on_every_host() -> None:
    digest = hashlib.sha256(nano_tokenizer()).hexdigest()
    assert digest == "51749835936a748f1bc9a7cab6b31c96cb048b0a2a4ca3fbb4ffc9b55f6b979f"
