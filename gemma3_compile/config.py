"""Configuration of one Gemma 3 model: plain, frozen data.

Field names follow transformers' ``Gemma3TextConfig`` and ``SiglipVisionConfig`` where these have
one. Presets are in ``presets.py``; ``hf_config.py`` reads a ``config.json``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from runtimes.errors import ConfigError

LayerKind = Literal["local", "global"]


def layer_pattern(num_layers: int, period: int = 6) -> tuple[LayerKind, ...]:
    """Five local layers, then one global (for ``period`` 6), repeated over ``num_layers``."""
    return tuple("global" if (i + 1) % period == 0 else "local" for i in range(num_layers))


def _check_positive(config: TextConfig | VisionConfig) -> None:
    """Refuses the first number among the fields that is not above zero."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float) and not value > 0:
            raise ConfigError(f"`{field.name} > 0` must hold, but got {value}")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text decoder.

    ``sliding_window`` counts the query itself. ``rope_global_factor`` divides the positions of
    global layers (8 from 4B up). The attention scale is ``query_pre_attn_scalar ** -0.5``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    sliding_window: int
    layer_kinds: tuple[LayerKind, ...]
    max_context: int
    rope_local_base: float = 10_000.0
    rope_global_base: float = 1_000_000.0
    rope_global_factor: float = 1.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_positive(self)
        if len(self.layer_kinds) != self.num_layers:
            raise ConfigError(
                "`len(layer_kinds) == num_layers` must hold, "
                f"but got (layer_kinds={len(self.layer_kinds)}, num_layers={self.num_layers})"
            )
        unknown = set(self.layer_kinds) - {"local", "global"}
        if unknown:
            raise ConfigError(f"`layer_kinds` must be of 'local' and 'global', but got {sorted(unknown)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "`num_heads % num_kv_heads == 0` must hold, "
                f"but got (num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"`head_dim` must be even for the rotary embedding, but got {self.head_dim}")

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def embed_scale(self) -> float:
        """What token embeddings are multiplied by: the square root of the hidden size."""
        return float(self.hidden_size**0.5)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The SigLIP tower and the pooling that follows it."""

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    tokens_per_image: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.image_size % self.patch_size:
            raise ConfigError(
                "`image_size % patch_size == 0` must hold, "
                f"but got (image_size={self.image_size}, patch_size={self.patch_size})"
            )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                "`hidden_size % num_heads == 0` must hold, "
                f"but got (hidden_size={self.hidden_size}, num_heads={self.num_heads})"
            )
        side = math.isqrt(self.tokens_per_image)
        if side * side != self.tokens_per_image or self.patches_per_side % side:
            raise ConfigError(
                f"`tokens_per_image` must be a square whose side divides {self.patches_per_side} patches, "
                f"but got {self.tokens_per_image}"
            )

    @property
    def patches_per_side(self) -> int:
        """Patches along one edge of the picture (64 for 896 / 14)."""
        return self.image_size // self.patch_size

    @property
    def pool(self) -> int:
        """Edge of the square of patches that one image token averages (4)."""
        return self.patches_per_side // math.isqrt(self.tokens_per_image)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Token ids with a meaning of their own. The image ids are None for text-only models."""

    bos: int = 2
    pad: int = 0
    unk: int = 3
    end: tuple[int, ...] = (1, 106)
    start_of_image: int | None = None
    end_of_image: int | None = None
    image: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. ``name`` is a preset's name, or ``custom``."""

    name: str
    text: TextConfig
    vision: VisionConfig | None
    tokens: SpecialTokens

    def __post_init__(self) -> None:
        if self.vision is not None and self.tokens.image is None:
            raise ConfigError("a model with a vision tower needs the image token ids, but `tokens.image` is None")
