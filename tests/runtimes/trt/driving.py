"""Calling a plugin as TensorRT does, with what it would pass: descriptors, addresses and a stream."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from autotune.correctness import Expectation
from autotune.kernel import Tensors
from autotune.kernels.sliding_window_attention import sliding_window_attention
from autotune.model_shapes import ModelShapes, VisionShapes
from runtimes.gpu.kernel_store import KernelStore
from runtimes.trt.plugin_base import KernelPlugin
from runtimes.trt.plugin_pool import SigLIPPoolPlugin
from runtimes.trt.plugin_window import SlidingWindowAttentionPlugin

POISON = 0xFF
"""What every byte of a workspace is before a call: a NaN in every type."""


def shapes(
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    *,
    scalar: int | None = None,
    vision: bool = True,
    patches: int = 4096,
    tokens: int = 256,
    vision_hidden: int = 1152,
) -> ModelShapes:
    """A model of one layer of each kind, as far as its kernels must know it."""
    siglip = VisionShapes(
        layers=1,
        hidden=vision_hidden,
        ffn=64,
        heads=1,
        head_dim=vision_hidden,
        image_size=14 * math.isqrt(patches),
        patch_size=14,
        patches=patches,
        tokens=tokens,
    )
    return ModelShapes(
        name="test",
        hidden=heads * head_dim,
        ffn=256,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar or head_dim,
        vocab=512,
        window=window,
        local_layers=1,
        global_layers=1,
        vision=siglip if vision else None,
    )


@dataclass(frozen=True, kw_only=True)
class Driven:
    """A plugin attached to a context, and all that its calls of one shape are given."""

    plugin: KernelPlugin
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    workspace: Tensor

    def enqueue(self) -> None:
        """One call on torch's current stream."""
        self.plugin.enqueue(
            descriptors(self.inputs),
            descriptors(self.outputs),
            [tensor.data_ptr() for tensor in self.inputs],
            [tensor.data_ptr() for tensor in self.outputs],
            self.workspace.data_ptr(),
            torch.cuda.current_stream().cuda_stream if self.workspace.is_cuda else 0,
        )


def drive(plugin: KernelPlugin, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Driven:
    """Attaches the plugin, tells it the shapes, and gives it a workspace of the size that it asked for at build time."""
    largest = [SimpleNamespace(max=tuple(tensor.shape)) for tensor in inputs]
    size = plugin.get_workspace_size(largest, [])
    attached = plugin.attach_to_context(None)
    attached.on_shape_change(descriptors(inputs), descriptors(outputs))
    workspace = torch.full((max(size, 1),), POISON, dtype=torch.uint8, device=inputs[0].device)
    return Driven(plugin=attached, inputs=tuple(inputs), outputs=tuple(outputs), workspace=workspace)


def window_plugin(store: KernelStore, window: int, scale: float) -> SlidingWindowAttentionPlugin:
    """As a deserialised plan has it."""
    return SlidingWindowAttentionPlugin(
        trt=None, store=store, building=False, kernels=store.hash, window=window, scale=scale
    )


def pool_plugin(store: KernelStore, pool: int, eps: float) -> SigLIPPoolPlugin:
    """As a deserialised plan has it."""
    return SigLIPPoolPlugin(trt=None, store=store, building=False, kernels=store.hash, pool=pool, eps=eps)


def window_call(store: KernelStore, tensors: Mapping[str, Tensor], scale: float) -> Driven:
    """The window plugin over a chunk's tensors, as :func:`autotune.kernels.prefill_space.chunk_tensors` names them.

    ``k_cache`` and ``v_cache`` are written; a text's ``visible_end`` is made here.
    """
    q, start, length = tensors["q"], tensors["start"], tensors["length"]
    step_S = torch.arange(1, q.shape[1] + 1, dtype=torch.int32, device=q.device)
    visible_end = tensors.get("visible_end", step_S.expand(q.shape[0], -1).contiguous())
    inputs = [*(tensors[name] for name in ("q", "k", "v", "k_cache", "v_cache")), start, length]
    inputs += [start + length - 1, visible_end]
    outputs = [torch.full_like(q, float("nan")), tensors["k_cache"], tensors["v_cache"]]
    return drive(window_plugin(store, tensors["k_cache"].shape[2], scale), inputs, outputs)


def descriptors(tensors: Sequence[Tensor]) -> list[Any]:
    """What TensorRT says of tensors."""
    return [SimpleNamespace(dims=tuple(tensor.shape)) for tensor in tensors]


def scale_of(model: ModelShapes) -> float:
    """What scores are multiplied by."""
    return 1 / math.sqrt(model.query_pre_attn_scalar)


def expected_of(model: ModelShapes, t: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both caches by the oracle, in ``dtype``."""
    q, k, v, k_cache, v_cache = (t[name].to(dtype) for name in ("q", "k", "v", "k_cache", "v_cache"))
    start, length = t["start"].long(), t["length"].long()
    images = t.get("image_ids")
    return sliding_window_attention(q, k, v, k_cache, v_cache, start, length, images, model.window, scale_of(model))


def real_rows(out_BSND: Tensor, length_B: Tensor) -> Tensor:
    """Rows that are no padding, of all sequences."""
    step_S = torch.arange(out_BSND.shape[1], device=out_BSND.device)
    return out_BSND[step_S[None, :] < length_B[:, None]]


def check_window(model: ModelShapes, before: Tensors, call: Driven) -> None:
    """What a call left behind, against the oracle on what it was given."""
    exact, plain = (expected_of(model, before, dtype) for dtype in (torch.float32, torch.bfloat16))
    wanted, rough, found = (real_rows(out, before["length"]) for out in (exact[0], plain[0], call.outputs[0]))
    comparison = Expectation.of(wanted, rough).compare("out", found)
    assert comparison.passed, comparison
    for name, oracle, cache in zip(("k_cache", "v_cache"), plain[1:], call.outputs[1:], strict=True):
        assert torch.equal(oracle, cache), name
