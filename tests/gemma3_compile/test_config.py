"""What a configuration refuses, and what it derives."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from gemma3_compile.config import ModelConfig, SpecialTokens, TextConfig, VisionConfig, layer_pattern
from gemma3_compile.presets import preset
from runtimes.errors import ConfigError


def test_layer_pattern() -> None:
    assert layer_pattern(8) == ("local",) * 5 + ("global",) + ("local",) * 2
    assert layer_pattern(4, 2) == ("local", "global") * 2
    assert layer_pattern(2, 1) == ("global",) * 2


TEXT_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"num_layers": 5}, "`len(layer_kinds) == num_layers` must hold, but got (layer_kinds=6, num_layers=5)"),
    ({"num_kv_heads": 3}, "`num_heads % num_kv_heads == 0` must hold, but got (num_heads=4, num_kv_heads=3)"),
    ({"num_kv_heads": 0}, "`num_kv_heads > 0` must hold, but got 0"),
    ({"num_heads": -4}, "`num_heads > 0` must hold, but got -4"),
    ({"head_dim": 31}, "`head_dim` must be even for the rotary embedding, but got 31"),
    ({"sliding_window": 0}, "`sliding_window > 0` must hold, but got 0"),
    ({"query_pre_attn_scalar": 0.0}, "`query_pre_attn_scalar > 0` must hold, but got 0.0"),
    ({"rope_global_factor": float("nan")}, "`rope_global_factor > 0` must hold, but got nan"),
    ({"rms_norm_eps": -1e-6}, "`rms_norm_eps > 0` must hold, but got -1e-06"),
    (
        {"layer_kinds": ("local",) * 5 + ("sliding",)},
        "`layer_kinds` must be of 'local' and 'global', but got ['sliding']",
    ),
]


@pytest.mark.parametrize(("change", "message"), TEXT_FAULTS, ids=lambda value: str(value)[:40])
def test_text_faults(nano_config: ModelConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(nano_config.text, **change)


VISION_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"patch_size": 16}, "`image_size % patch_size == 0` must hold, but got (image_size=56, patch_size=16)"),
    ({"patch_size": 0}, "`patch_size > 0` must hold, but got 0"),
    ({"num_heads": 5}, "`hidden_size % num_heads == 0` must hold, but got (hidden_size=48, num_heads=5)"),
    ({"tokens_per_image": 0}, "`tokens_per_image > 0` must hold, but got 0"),
    ({"tokens_per_image": 5}, "`tokens_per_image` must be a square whose side divides 4 patches, but got 5"),
    ({"tokens_per_image": 9}, "`tokens_per_image` must be a square whose side divides 4 patches, but got 9"),
]


@pytest.mark.parametrize(("change", "message"), VISION_FAULTS, ids=lambda value: str(value)[:40])
def test_vision_faults(nano_config: ModelConfig, change: dict[str, Any], message: str) -> None:
    assert nano_config.vision is not None
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(nano_config.vision, **change)


def test_vision_needs_the_image_token(nano_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="needs the image token ids"):
        dataclasses.replace(nano_config, tokens=SpecialTokens())


def test_scales() -> None:
    """27b divides by the square root of hidden / heads, the others by that of head_dim."""
    assert preset("12b").text.scale == 256**-0.5
    assert preset("27b").text.scale == pytest.approx((5376 / 32) ** -0.5)
    assert preset("4b").text.embed_scale == pytest.approx(2560**0.5)


def test_pooling_of_the_real_tower() -> None:
    vision = preset("4b").vision
    assert vision is not None
    assert (vision.patches_per_side, vision.pool) == (64, 4)


@pytest.mark.parametrize("kind", [TextConfig, VisionConfig, SpecialTokens, ModelConfig])
def test_configs_are_frozen_and_keyword_only(kind: type) -> None:
    with pytest.raises(TypeError):
        kind(1, 2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("nano").name = "other"  # type: ignore[misc]
