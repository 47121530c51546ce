"""Image blocks: two-way attention within an image, inside the window, against transformers, fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gemma3_compile.config import ModelConfig
from gemma3_compile.model import Gemma3
from tests.tolerances import check
from tests.twins import Twin, eager_logits, passage, seeded_model, twin_logits, twin_of

WINDOW, PER_IMAGE = 16, 4  # of nano

# Where images begin, and the chunks of the cached run: none of them cuts an image.
CASES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "one image": (12, (5,), ()),
    "image first": (9, (0,), (4, 3)),
    "image last": (12, (8,), (8,)),
    "image begins a chunk": (40, (20,), (20, 9)),
    "image ends a chunk": (40, (20,), (24,)),
    "image is a chunk": (40, (20,), (20, PER_IMAGE)),
    "image across the window's edge": (WINDOW + 9, (WINDOW - 2,), (WINDOW - 2, PER_IMAGE)),
    "image at the window's edge": (WINDOW + 9, (WINDOW,), (WINDOW,)),
    "image leaves the window": (3 * WINDOW, (3,), (7, 5, 5) + (1,) * 20),
    "image past two windows": (3 * WINDOW, (2 * WINDOW + 1,), (11, 11, 11)),
    "two images": (30, (3, 12), (9,)),
    "two images, one token between": (30, (3, 8), (13,)),
    "two images in one chunk": (60, (20, 41), (19, 30)),
    "three images, windows apart": (80, (2, 30, 60), (29, 29)),
}


@pytest.mark.parametrize("name", CASES)
def test_images_equal_transformers(nano_model: Gemma3, nano_twin: Twin, name: str) -> None:
    length, images_at, chunks = CASES[name]
    prompt = passage(nano_model.config, length, images_at)
    theirs = twin_logits(nano_twin, prompt)
    check("eager.logits", eager_logits(nano_model, prompt), theirs, f"{name}, uncached")
    check("eager.logits", eager_logits(nano_model, prompt, chunks), theirs, f"{name}, in chunks {chunks}")


def test_an_image_longer_than_the_window(nano_config: ModelConfig) -> None:
    """16 tokens an image in a window of 6: a token sees the image's later tokens, and no further back than the window."""
    assert nano_config.vision is not None
    config = replace(
        nano_config,
        name="custom",
        text=replace(nano_config.text, sliding_window=6),
        vision=replace(nano_config.vision, tokens_per_image=16),
    )
    model = seeded_model(config)
    prompt = passage(config, 50, (3, 25))
    theirs = twin_logits(twin_of(model), prompt)
    check("eager.logits", eager_logits(model, prompt), theirs)
    check("eager.logits", eager_logits(model, prompt, (3, 17, 5, 16)), theirs)


def test_an_image_changes_what_stands_before_it_only_within_itself(nano_model: Gemma3) -> None:
    """Text before an image cannot see it: its logits are those of the text alone."""
    prompt = passage(nano_model.config, 20, (8,))
    text = replace(prompt, pixels=None)
    check("eager.chunking", eager_logits(nano_model, prompt)[:8], eager_logits(nano_model, text)[:8])
