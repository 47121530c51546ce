"""The kernels' view of a configuration."""

from __future__ import annotations

import pytest

from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import PRESETS, preset


def test_the_sizes_of_12b() -> None:
    shapes = model_shapes(preset("12b"))
    assert (shapes.name, shapes.hidden, shapes.ffn, shapes.vocab) == ("12b", 3840, 15360, 262_208)
    assert (shapes.heads, shapes.kv_heads, shapes.head_dim, shapes.window) == (16, 8, 256, 1024)
    assert (shapes.local_layers, shapes.global_layers) == (40, 8)
    assert (shapes.query_pre_attn_scalar, model_shapes(preset("27b")).query_pre_attn_scalar) == (256, 168)
    assert shapes.vision is not None
    assert (shapes.vision.head_dim, shapes.vision.patches, shapes.vision.tokens) == (72, 4096, 256)


@pytest.mark.parametrize("name", PRESETS)
def test_layers_add_up_and_text_sizes_have_no_vision(name: str) -> None:
    config = preset(name)
    shapes = model_shapes(config)
    assert shapes.layers == config.text.num_layers
    assert (shapes.vision is None) == (config.vision is None)
