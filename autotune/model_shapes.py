"""The sizes of a model that decide the shapes of its kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VisionShapes:
    """SigLIP: ``patches`` an image, ``tokens`` after pooling."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    head_dim: int
    image_size: int
    patch_size: int
    patches: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """A Gemma 3: ``window`` is W, the query counted; scores are divided by the root of ``query_pre_attn_scalar``; ``vision``
    None for text-only sizes.
    """

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    query_pre_attn_scalar: int
    vocab: int
    window: int
    local_layers: int
    global_layers: int
    vision: VisionShapes | None

    @property
    def layers(self) -> int:
        """All decoder layers."""
        return self.local_layers + self.global_layers
