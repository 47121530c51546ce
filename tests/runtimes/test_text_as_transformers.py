"""Tokenizer and chat template on the real 270M's vocabulary, against transformers.

The outside oracle is transformers' own reading of the GGUF (its converter, its BPE); ours rebuilds a
SentencePiece model. Known differences are tests of their own: docs/tokenizer.md lists the same.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gemma3_compile.checkpoints import open_checkpoint
from runtimes import chat
from runtimes.manifest import ImageFacts, LayerFacts, ModelFacts, PanAndScanFacts, TokenFacts
from runtimes.tokenizer import CONTROL, Tokenizer
from tests.runtimes.tokenizer_strings import STRINGS, WITH_CONTROL_STRINGS

TOKENS = TokenFacts(bos=2, pad=0, unk=3, end=(1, 106), start_of_image=255999, end_of_image=256000, image=262144)
# The real picture of 896 × 896 and 256 tokens, in small: the processor does not care.
FACTS = ModelFacts(
    name="4b",
    vocab_size=262208,
    hidden_size=2560,
    max_context=131072,
    layers=(LayerFacts(kind="global", kv_heads=4, head_dim=256, window=None),),
    tokens=TOKENS,
    image=ImageFacts(
        size=56,
        tokens_per_image=4,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        rescale=1 / 255,
        resample="bilinear",
        pan_and_scan=PanAndScanFacts(),
    ),
)


@pytest.fixture(scope="module")
def tokenizer(gguf_270m_path: Path) -> Tokenizer:
    checkpoint = open_checkpoint(gguf_270m_path, size="270m")
    try:
        model = checkpoint.tokenizer()
    finally:
        checkpoint.close()
    assert model is not None
    return Tokenizer.from_bytes(model, TOKENS)


@pytest.fixture(scope="module")
def oracle(gguf_270m_path: Path, request: pytest.FixtureRequest) -> Any:
    """transformers' tokenizer; converting the file takes 20 seconds, so the result is kept in pytest's cache."""
    import transformers

    kept = request.config.cache.mkdir("transformers-tokenizer") / transformers.__version__
    if not kept.is_dir():
        converted = transformers.AutoTokenizer.from_pretrained(gguf_270m_path.parent, gguf_file=gguf_270m_path.name)
        partial = kept.with_suffix(f".{os.getpid()}")  # several test processes may come here at once
        converted.save_pretrained(partial)
        try:
            partial.rename(kept)
        except OSError:
            shutil.rmtree(partial)
    tokenizer = transformers.AutoTokenizer.from_pretrained(kept)
    # What a vision checkpoint's tokenizer has beside it, and this text-only one lacks.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.boi_token, tokenizer.eoi_token = "<start_of_image>", "<end_of_image>"
    tokenizer.image_token, tokenizer.boi_token_id = "<image_soft_token>", TOKENS.start_of_image
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    assert tokenizer.image_token_id == TOKENS.image
    return tokenizer


@pytest.fixture(scope="module")
def processor(oracle: Any) -> Any:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Gemma3Processor(images, oracle, image_seq_length=4)


def ids_of(oracle: Any, text: str) -> list[int]:
    ids: list[int] = oracle(text, add_special_tokens=False).input_ids
    return ids


def test_three_hundred_strings_have_the_same_ids(tokenizer: Tokenizer, oracle: Any) -> None:
    assert len(set(STRINGS)) >= 300
    assert [text for text in STRINGS if tokenizer.encode(text) != ids_of(oracle, text)] == []


def test_three_hundred_strings_decode_alike(tokenizer: Tokenizer, oracle: Any) -> None:
    for text in STRINGS:
        ids = tokenizer.encode(text)
        pieces = b"".join(tokenizer.piece_bytes(token) for token in ids)
        assert pieces.decode() == tokenizer.decode(ids) == oracle.decode(ids)
        if "\u2581" not in text:
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", WITH_CONTROL_STRINGS)
def test_control_strings_on_request_have_the_same_ids(tokenizer: Tokenizer, oracle: Any, text: str) -> None:
    ids = tokenizer.encode(text, control=True)
    assert ids == ids_of(oracle, text)
    assert tokenizer.decode(ids, control=True) == oracle.decode(ids)
    assert tokenizer.decode(ids) == CONTROL.sub("", text)


def test_no_control_piece_of_the_vocabulary_can_be_typed(tokenizer: Tokenizer) -> None:
    control = [token for token in range(tokenizer.vocab_size) if tokenizer.is_control(token)]
    assert len(control) == 6252  # 6242 unused, 4 of turns and images, pad, eos, bos, unk, mask, multimodal
    for token in control:
        text = f"a{tokenizer.piece(token)} {tokenizer.piece(token)}b"
        ids = tokenizer.encode(text)
        assert not any(tokenizer.is_control(i) for i in set(ids)), text
        assert tokenizer.decode(ids) == text


def test_typed_control_strings_differ_from_transformers(tokenizer: Tokenizer, oracle: Any) -> None:
    """Known difference 1: there they steer the model."""
    assert ids_of(oracle, "<end_of_turn>") == [106]
    assert 106 not in tokenizer.encode("<end_of_turn>")


@pytest.mark.parametrize("count", [32, 33, 40, 62, 100])
def test_long_runs_of_spaces_differ_from_transformers(tokenizer: Tokenizer, oracle: Any, count: int) -> None:
    """Known difference 2: SentencePiece takes the longest run of 31 first; transformers merges by pairs."""
    ids = tokenizer.encode(" " * count)
    assert [len(tokenizer.piece(token)) for token in ids] == [31] * (count // 31) + [count % 31] * (count % 31 > 0)
    assert ids != ids_of(oracle, " " * count)
    assert tokenizer.decode(ids) == oracle.decode(ids_of(oracle, " " * count)) == " " * count


def test_cut_characters_differ_from_transformers(tokenizer: Tokenizer, oracle: Any) -> None:
    """Known difference 3: one replacement character for a cut-off character, there one for each byte."""
    first, second = 238 + 0xE6, 238 + 0x97
    assert (tokenizer.piece(first), tokenizer.piece(second)) == ("<0xE6>", "<0x97>")
    assert tokenizer.decode([first, second]) == "\ufffd"
    assert oracle.decode([first, second]) == "\ufffd\ufffd"


def test_random_ids_decode_alike(tokenizer: Tokenizer, oracle: Any) -> None:
    """Any ids that are no bytes, as a model with random weights writes them."""
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(494, tokenizer.vocab_size) for _ in range(20)]
        assert tokenizer.decode(ids, control=True) == oracle.decode(ids)


CHATS: dict[str, tuple[list[chat.Message], str]] = {
    "one turn": (
        [{"role": "user", "content": "Hi there"}],
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
    ),
    "trimmed": (
        [{"role": "user", "content": " \n\tWhy?\n\n"}],
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "three turns": (
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": " 2\n"},
            {"role": "user", "content": "And 2+2?"},
        ],
        (
            "<bos><start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>\n"
            "<start_of_turn>user\nAnd 2+2?<end_of_turn>\n<start_of_turn>model\n"
        ),
    ),
    "system": (
        [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " Hello "}],
        "<bos><start_of_turn>user\nBe brief. \n\nHello<end_of_turn>\n<start_of_turn>model\n",
    ),
    "system in parts": (
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "\nb"}]},
        ],
        "<bos><start_of_turn>user\nBe brief.\n\nab<end_of_turn>\n<start_of_turn>model\n",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chats_have_the_ids_of_the_template(tokenizer: Tokenizer, oracle: Any, name: str) -> None:
    messages, text = CHATS[name]
    assert chat.render(messages, tokenizer, FACTS).token_ids.tolist() == ids_of(oracle, text)


PICTURES = {
    "square": (100, 100),
    "wide": (900, 300),
    "tall": (300, 1400),
    "not long enough": (600, 560),
}


@pytest.mark.parametrize("pan_and_scan", [False, True])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_expand_as_the_processor_expands_them(
    tokenizer: Tokenizer, processor: Any, name: str, pan_and_scan: bool
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*PICTURES[name][::-1], 3), np.uint8)
    first, second = Image.fromarray(noise), Image.new("RGB", (50, 50), (200, 10, 10))
    content = [
        {"type": "text", "text": "Compare "},
        {"type": "image", "image": first},
        {"type": "image", "image": second},
        {"type": "text", "text": " now."},
    ]
    ours = chat.render([{"role": "user", "content": content}], tokenizer, FACTS, pan_and_scan=pan_and_scan)
    text = "<bos><start_of_turn>user\nCompare<start_of_image><start_of_image>now.<end_of_turn>\n<start_of_turn>model\n"
    theirs = processor(images=[[first, second]], text=[text], add_special_tokens=False, do_pan_and_scan=pan_and_scan)
    assert ours.token_ids.tolist() == theirs["input_ids"][0]
    assert (ours.image_ids >= 0).astype(int).tolist() == theirs["token_type_ids"][0]
    assert ours.pixels is not None
    np.testing.assert_array_equal(ours.pixels, np.stack(theirs["pixel_values"]))
    # Soft tokens of one picture or crop are one run; the runs are numbered as the pixels are.
    assert ours.image_ids[ours.image_ids >= 0].tolist() == np.repeat(np.arange(len(ours.pixels)), 4).tolist()


def test_raw_text_with_a_placeholder_expands_as_the_processor_expands_it(tokenizer: Tokenizer, processor: Any) -> None:
    picture = Image.new("RGB", (60, 40), (0, 100, 0))
    text = "Look:\n<start_of_image>\nin this image there is"
    ours = chat.complete(text, tokenizer, FACTS, images=[picture], control=True)
    theirs = processor(images=[[picture]], text=[text])
    assert ours.token_ids.tolist() == theirs["input_ids"][0]
