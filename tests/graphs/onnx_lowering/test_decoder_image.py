"""Chunks with images in ONNX Runtime against eager, on the caches that the text decoder also uses.

An image of nano takes 4 tokens; the window is 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gemma3_compile.model import Gemma3
from tests.graphs.decoders import Chunk, EagerDecoder, OrtDecoder, compare, image_chunk, text_chunk
from tests.graphs.nano import WINDOW

CONTEXT = 80
SLOTS = (WINDOW, WINDOW + 7)
STEPS = [text_chunk([1], seed=i) for i in range(3)]


def scene(before: int, size: int, images_at: Sequence[int]) -> list[Chunk]:
    """Text up to position ``before``, a chunk with images, then steps and another chunk of text."""
    text = [text_chunk([before], seed=before)] if before else []
    return [*text, image_chunk(size, images_at, seed=size), *STEPS, text_chunk([9], seed=9)]


SCENES = {
    "an image at the start of the first chunk": scene(0, 7, [0]),
    "an image at the end of a chunk": scene(3, 9, [5]),
    "an image and nothing else": scene(6, 4, [0]),
    "images at both edges": scene(5, 11, [0, 7]),
    "two images side by side": scene(2, 12, [3, 7]),
    "an image across the window's edge": scene(11, 10, [3]),  # positions 14 to 17
    "an image that begins where the window ends": scene(12, 8, [4]),
    "an image far past the window": scene(41, 8, [2]),
    "a chunk longer than the window": scene(0, 40, [1, 14, 30]),
    "a long chunk on a full window": scene(20, 24, [0, 20]),
    "an image in a window with slack": scene(22, 6, [1]),
    "three chunks of images in a row": [
        image_chunk(6, [1], seed=1),
        image_chunk(10, [6], seed=2),
        image_chunk(12, [0, 4], seed=3),
        *STEPS,
    ],
}


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("name", SCENES)
def test_images_as_eager_sees_them(graphs: Mapping[str, Any], nano_model: Gemma3, name: str, slots: int) -> None:
    ours = OrtDecoder(graphs, 1, CONTEXT, slots=slots)
    compare("ort.logits", EagerDecoder(nano_model, 1, CONTEXT), ours, SCENES[name])


def test_text_alone_gives_what_the_text_decoder_gives(graphs: Mapping[str, Any], nano_model: Gemma3) -> None:
    """No token of the chunk is an image's."""
    chunks = [image_chunk(20, [], seed=4), image_chunk(5, [], seed=5)]
    compare("ort.logits", EagerDecoder(nano_model, 1, CONTEXT), OrtDecoder(graphs, 1, CONTEXT), chunks)
    plain, other = OrtDecoder(graphs, 1, CONTEXT), OrtDecoder(graphs, 1, CONTEXT)
    for chunk in chunks:
        ours, theirs = other(chunk)["logits"], plain(replace(chunk, images=None))["logits"]
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_padding_behind_the_real_tokens(graphs: Mapping[str, Any], nano_model: Gemma3) -> None:
    """The session does not pad, but the contract has a length: five rows of the chunk are none of its tokens."""
    chunk = image_chunk(12, [2], seed=6)
    padded = replace(chunk, length_B=torch.tensor([7]), rows_BR=torch.tensor([[6, 0]]))
    chunks = [text_chunk([14], seed=7), padded, *STEPS]
    compare("ort.logits", EagerDecoder(nano_model, 1, CONTEXT), OrtDecoder(graphs, 1, CONTEXT), chunks)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("name", ["a long chunk on a full window", "three chunks of images in a row"])
def test_in_place_is_out_of_place_to_the_bit(graphs: Mapping[str, Any], name: str, slots: int) -> None:
    """TensorScatter and the compact layout's body with every cache output bound to its input's buffer."""
    plain = OrtDecoder(graphs, 1, CONTEXT, slots=slots)
    bound = OrtDecoder(graphs, 1, CONTEXT, slots=slots, in_place=True)
    addresses = {cache: array.ctypes.data for cache, array in bound.caches.items()}
    for chunk in SCENES[name]:
        expected, ours = plain(chunk), bound(chunk)
        assert np.array_equal(ours["logits"], expected["logits"])
        for cache, array in plain.caches.items():
            # What a cache holds; rows beyond that may keep older bytes in one of the two.
            held = slice(int(plain.start_B) if cache.startswith("cache.5") else min(int(plain.start_B), WINDOW))
            assert np.array_equal(bound.caches[cache][:, :, held], array[:, :, held]), cache
    assert addresses == {cache: array.ctypes.data for cache, array in bound.caches.items()}
