"""The custom ops of an exported Gemma 3 graph: ``torch.ops.gemma3c.*``.

Each op is one node for every target to lower in its own way. Its body is the torch oracle of
``autotune.kernels``, so eager execution, the ONNX fallback and the kernels' tests mean one thing.
Importing this module registers the ops. Shapes are in the kernels' files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autotune.kernels import global_attention as _global
from autotune.kernels import rotary as _rotary
from autotune.kernels import siglip_pool as _pool
from autotune.kernels import sliding_window_attention as _window


@torch.library.custom_op("gemma3c::sliding_window_attention", mutates_args=())
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    length: Tensor,
    image_ids: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Windowed attention over a ring cache of ``window`` slots; see the kernel's oracle."""
    return _window.sliding_window_attention(q, k, v, k_cache, v_cache, start, length, image_ids, window, scale)


@sliding_window_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


@torch.library.custom_op("gemma3c::global_attention", mutates_args=())
def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    length: Tensor,
    image_ids: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a linear cache; see the kernel's oracle."""
    return _global.global_attention(q, k, v, k_cache, v_cache, start, length, image_ids, scale)


@global_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache)


@torch.library.custom_op("gemma3c::siglip_pool", mutates_args=())
def siglip_pool(x: Tensor, scale: Tensor, pool: int, eps: float) -> Tensor:
    """Average pooling in squares of patches, then RMSNorm; see the kernel's oracle."""
    return _pool.siglip_pool(x, scale, pool, eps).contiguous()


@siglip_pool.register_fake
def _(x: Tensor, scale: Tensor, pool: int, eps: float) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // (pool * pool), x.shape[2]))


@torch.library.custom_op("gemma3c::rotary_table", mutates_args=())
def rotary_table(position: Tensor, head_dim: int, base: float, factor: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding; see the kernel's oracle."""
    return _rotary.rotary_table(position, head_dim, base, factor)


@rotary_table.register_fake
def _(position: Tensor, head_dim: int, base: float, factor: float) -> tuple[Tensor, Tensor]:
    shape = (*position.shape, head_dim // 2)
    return position.new_empty(shape, dtype=torch.float32), position.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("gemma3c::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding applied to every head; see the kernel's oracle."""
    return _rotary.rotate(x, cos, sin)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gemma3c::add_rms_norm", mutates_args=())
def add_rms_norm(a: Tensor, b: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of ``a`` and ``b``, normalised, and the sum itself; made by the pass ``fuse_add_norm``."""
    total = a + b
    return torch.nn.functional.rms_norm(total.float(), (total.shape[-1],), scale, eps).to(total.dtype), total


@add_rms_norm.register_fake
def _(a: Tensor, b: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(a)


gemma3c = torch.ops.gemma3c
"""The registered ops as FX graphs hold them (``gemma3c.rotate.default``): importing the name registers them."""
