"""SigLIP, pooling and projection against transformers with the same weights, fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gemma3_compile.config import ModelConfig
from gemma3_compile.model import Gemma3
from tests.tolerances import check, relative_error
from tests.twins import Twin, seeded_model, twin_of

SHAPES: dict[str, dict[str, object]] = {
    "nano": {},
    # The proportions of the real tower: pool 4 by 4, heads of 72.
    "siglip in miniature": {
        "image_size": 224,
        "hidden_size": 144,
        "num_heads": 2,
        "tokens_per_image": 16,
        "num_layers": 4,
    },
    "no pooling": {"tokens_per_image": 16},
    "one token": {"tokens_per_image": 1},
    "odd side": {"image_size": 42, "tokens_per_image": 9},
    "large epsilon": {"layer_norm_eps": 1e-2},
}


def _pixels(config: ModelConfig, images: int) -> torch.Tensor:
    assert config.vision is not None
    size = config.vision.image_size
    return torch.randn((images, 3, size, size), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SHAPES)
def test_features_equal_transformers(nano_config: ModelConfig, name: str) -> None:
    assert nano_config.vision is not None
    model = seeded_model(replace(nano_config, name="custom", vision=replace(nano_config.vision, **SHAPES[name])))
    assert model.vision is not None
    twin, pixels = twin_of(model), _pixels(model.config, 3)
    theirs = twin.get_image_features(pixels)
    check("eager.features", model.vision.encode(pixels), theirs.last_hidden_state, f"{name}: patch features")
    check("eager.features", model.vision(pixels), theirs.pooler_output, f"{name}: pooled and projected")


def test_images_of_a_batch_are_apart(nano_model: Gemma3) -> None:
    assert nano_model.vision is not None
    pixels = _pixels(nano_model.config, 3)
    check("eager.chunking", nano_model.vision(pixels)[1:2], nano_model.vision(pixels[1:2]))


def test_a_flipped_patch_is_caught(nano_model: Gemma3, nano_twin: Twin) -> None:
    """Rows and columns of patches swapped: the comparison must be far beyond its tolerance."""
    assert nano_model.vision is not None
    pixels = _pixels(nano_model.config, 1)
    theirs = nano_twin.get_image_features(pixels).pooler_output
    assert relative_error(nano_model.vision(pixels.transpose(2, 3)), theirs) > 1e-2
