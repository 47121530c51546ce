"""From a model's configuration to what graphs (stages) and runtimes (manifest) must know of it."""

from __future__ import annotations

from typing import Any

from gemma3_compile.config import ModelConfig
from graphs.stages import CacheShape, DecoderShape, Dim, Stage, VisionShape
from runtimes.manifest import ImageFacts, LayerFacts, ModelFacts, PanAndScanFacts, StageFacts, TensorFacts, TokenFacts


def decoder_shape(config: ModelConfig, *, local: Dim = "L", context: Dim = "C", dtype: str = "float32") -> DecoderShape:
    """The decoder's contract: slots of a local layer's cache and of a global one's, and what caches hold."""
    text = config.text
    caches = tuple(
        CacheShape(
            kv_heads=text.num_kv_heads,
            slots=local if kind == "local" else context,
            head_dim=text.head_dim,
        )
        for kind in text.layer_kinds
    )
    return DecoderShape(hidden_size=text.hidden_size, vocab_size=text.vocab_size, caches=caches, cache_dtype=dtype)


def vision_shape(config: ModelConfig, *, dtype: str = "float32") -> VisionShape:
    """The vision tower's contract; ``dtype`` is that of pixels and features."""
    assert config.vision is not None
    return VisionShape(
        image_size=config.vision.image_size,
        tokens_per_image=config.vision.tokens_per_image,
        text_hidden_size=config.text.hidden_size,
        dtype=dtype,
    )


def image_facts(config: ModelConfig, settings: dict[str, Any] | None) -> ImageFacts | None:
    """How pictures are prepared: Gemma 3's values, with what the checkpoint's own settings say instead."""
    if config.vision is None:
        return None
    given = settings or {}
    scan = PanAndScanFacts(
        enabled=bool(given.get("do_pan_and_scan") or False),
        min_crop_size=int(given.get("pan_and_scan_min_crop_size") or 256),
        max_num_crops=int(given.get("pan_and_scan_max_num_crops") or 4),
        min_ratio_to_activate=float(given.get("pan_and_scan_min_ratio_to_activate") or 1.2),
    )
    mean, std = given.get("image_mean") or (0.5, 0.5, 0.5), given.get("image_std") or (0.5, 0.5, 0.5)
    return ImageFacts(
        size=config.vision.image_size,
        tokens_per_image=config.vision.tokens_per_image,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        rescale=float(given.get("rescale_factor") or 1 / 255),
        resample="bicubic" if given.get("resample") == 3 else "bilinear",
        pan_and_scan=scan,
    )


def model_facts(config: ModelConfig, settings: dict[str, Any] | None) -> ModelFacts:
    """What the manifest says of the model."""
    text, tokens = config.text, config.tokens
    layers = tuple(
        LayerFacts(
            kind=kind,
            kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            window=text.sliding_window if kind == "local" else None,
        )
        for kind in text.layer_kinds
    )
    return ModelFacts(
        name=config.name,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        max_context=text.max_context,
        layers=layers,
        tokens=TokenFacts(
            bos=tokens.bos,
            pad=tokens.pad,
            unk=tokens.unk,
            end=tokens.end,
            start_of_image=tokens.start_of_image,
            end_of_image=tokens.end_of_image,
            image=tokens.image,
        ),
        image=image_facts(config, settings),
    )


def stage_facts(stage: Stage, graph: str) -> StageFacts:
    """A stage's contract as the manifest writes it."""
    inputs = tuple(TensorFacts(name=s.name, dtype=s.dtype, shape=s.shape) for s in stage.inputs)
    outputs = tuple(TensorFacts(name=s.name, dtype=s.dtype, shape=s.shape) for s in stage.outputs)
    return StageFacts(graph=graph, inputs=inputs, outputs=outputs)
