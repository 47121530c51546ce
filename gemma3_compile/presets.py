"""The sizes gemma3c knows by name: plain data.

Source: Gemma 3 report (arXiv 2503.19786) and the ``config.json`` of each ``google/gemma-3-*`` checkpoint;
where those files leave a field out, transformers' ``Gemma3TextConfig`` default stands here. ``nano`` is a toy
of our own with every feature and no published weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from gemma3_compile.config import ModelConfig, SpecialTokens, TextConfig, VisionConfig, layer_pattern
from runtimes.errors import UsageError

CUSTOM = "custom"
"""``ModelConfig.name`` of an architecture that is none of the presets."""

_TEXT_TOKENS = SpecialTokens()
_IMAGE_TOKENS = SpecialTokens(start_of_image=255_999, end_of_image=256_000, image=262_144)
_SIGLIP = VisionConfig(
    image_size=896,
    patch_size=14,
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=27,
    num_heads=16,
    tokens_per_image=256,
)

_NANO = ModelConfig(
    name="nano",
    text=TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_kinds=layer_pattern(6),
        max_context=512,
        rope_global_factor=8.0,
    ),
    vision=VisionConfig(
        image_size=56,
        patch_size=14,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=2,
        tokens_per_image=4,
    ),
    tokens=SpecialTokens(start_of_image=255, end_of_image=256, image=511),
)

_270M = ModelConfig(
    name="270m",
    text=TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_layers=18,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_kinds=layer_pattern(18),
        max_context=32_768,
    ),
    vision=None,
    tokens=_TEXT_TOKENS,
)

_1B = ModelConfig(
    name="1b",
    text=TextConfig(
        vocab_size=262_144,
        hidden_size=1152,
        intermediate_size=6912,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_kinds=layer_pattern(26),
        max_context=32_768,
    ),
    vision=None,
    tokens=_TEXT_TOKENS,
)

_4B = ModelConfig(
    name="4b",
    text=TextConfig(
        vocab_size=262_208,
        hidden_size=2560,
        intermediate_size=10_240,
        num_layers=34,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        layer_kinds=layer_pattern(34),
        max_context=131_072,
        rope_global_factor=8.0,
    ),
    vision=_SIGLIP,
    tokens=_IMAGE_TOKENS,
)

_12B = ModelConfig(
    name="12b",
    text=TextConfig(
        vocab_size=262_208,
        hidden_size=3840,
        intermediate_size=15_360,
        num_layers=48,
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        layer_kinds=layer_pattern(48),
        max_context=131_072,
        rope_global_factor=8.0,
    ),
    vision=_SIGLIP,
    tokens=_IMAGE_TOKENS,
)

_27B = ModelConfig(
    name="27b",
    text=TextConfig(
        vocab_size=262_208,
        hidden_size=5376,
        intermediate_size=21_504,
        num_layers=62,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,  # hidden_size / num_heads, not head_dim
        sliding_window=1024,
        layer_kinds=layer_pattern(62),
        max_context=131_072,
        rope_global_factor=8.0,
    ),
    vision=_SIGLIP,
    tokens=_IMAGE_TOKENS,
)

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {config.name: config for config in (_NANO, _270M, _1B, _4B, _12B, _27B)}
)
"""Every preset by name, smallest first."""

HUB_IDS: Mapping[str, str] = MappingProxyType(
    {
        "270m": "google/gemma-3-270m-it",
        "1b": "google/gemma-3-1b-it",
        "4b": "google/gemma-3-4b-it",
        "12b": "google/gemma-3-12b-it",
        "27b": "google/gemma-3-27b-it",
    }
)
"""The Hugging Face id a size is built from where no checkpoint is named; ``nano`` has none."""


def preset(name: str) -> ModelConfig:
    """The preset of that name.

    Raises:
        UsageError: there is none; the message lists the names.
    """
    if name not in PRESETS:
        raise UsageError(
            f"unknown size: expected one of {', '.join(PRESETS)}, but got {name!r}",
            hint="other sizes are read from a checkpoint's config.json: give --checkpoint",
        )
    return PRESETS[name]


def match(config: ModelConfig) -> str | None:
    """The preset with exactly this architecture (text decoder and vision tower), or None.

    Token ids are left out of the comparison: a pre-trained and an instruction-tuned checkpoint of one size
    end on different tokens.
    """
    for name, known in PRESETS.items():
        if (known.text, known.vision) == (config.text, config.vision):
            return name
    return None


def named(config: ModelConfig) -> ModelConfig:
    """``config`` with the name of the preset it matches, or ``custom``."""
    return dataclasses.replace(config, name=match(config) or CUSTOM)
