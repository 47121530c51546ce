"""What the kernels need to know of a model, from its configuration."""

from __future__ import annotations

from autotune.model_shapes import ModelShapes, VisionShapes
from gemma3_compile.config import ModelConfig, VisionConfig


def model_shapes(config: ModelConfig) -> ModelShapes:
    """The sizes that decide the shapes of a model's kernels."""
    text = config.text
    return ModelShapes(
        name=config.name,
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        heads=text.num_heads,
        kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        query_pre_attn_scalar=round(text.query_pre_attn_scalar),
        vocab=text.vocab_size,
        window=text.sliding_window,
        local_layers=text.layer_kinds.count("local"),
        global_layers=text.layer_kinds.count("global"),
        vision=None if config.vision is None else _vision_shapes(config.vision),
    )


def _vision_shapes(vision: VisionConfig) -> VisionShapes:
    return VisionShapes(
        layers=vision.num_layers,
        hidden=vision.hidden_size,
        ffn=vision.intermediate_size,
        heads=vision.num_heads,
        head_dim=vision.hidden_size // vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        patches=vision.patches_per_side**2,
        tokens=vision.tokens_per_image,
    )
