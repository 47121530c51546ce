"""Attention: torch's FlashAttention and cuDNN backends, FlexAttention, and cuDNN's own sliding window.

Legend: B batch, S tokens of a chunk, N query heads, G key-value heads, D head_dim, C slots of a cache; I images, P
patches, A heads of SigLIP. Peers get their operands with heads before tokens, contiguous, which suits them best.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from autotune.kernel import Case, Tensors
from bench.kernel_rows.cudnn_window import cudnn_window
from bench.kernel_rows.subject import Figures, Peer, Prepare, Sizes, Subject, use_of

FLASH, CUDNN, EFFICIENT = "SDPA, FlashAttention", "SDPA, cuDNN", "SDPA, memory-efficient"
FLEX, WINDOW = "FlexAttention, max-autotune", "cuDNN's sliding window"
_BACKENDS = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}
FLEX_MODE = "max-autotune-no-cudagraphs"
"""All that ``max-autotune`` does but its own CUDA graph: it is captured as everything else is."""
MOST_DECODE_US = 7.0


def subjects(sizes: Sizes) -> list[Subject]:
    """Prefill of both kinds of layers, decode of both, and SigLIP."""
    return [_window(sizes), _causal(sizes), *_decodes(sizes), _siglip(sizes)]


def _window(sizes: Sizes) -> Subject:
    kernel, case = use_of("window_prefill", sizes.large, "prefill", "local attention", context=sizes.chunk)
    return Subject(
        name=f"sliding-window prefill, S {sizes.chunk}, {_heads(case)}, W {case.dims['window']}",
        kernel=kernel,
        case=case,
        peers=(
            Peer(label=FLEX, prepare=flex_window, returns="out"),
            Peer(label=WINDOW, prepare=cudnn_window, returns="out"),
        ),
        figures=Figures(speed=(1.4, (FLEX,)), rate=True),
    )


def _causal(sizes: Sizes) -> Subject:
    kernel, case = use_of("global_prefill", sizes.large, "prefill", "global attention", context=sizes.chunk)
    return Subject(
        name=f"causal prefill, S {sizes.chunk}, {_heads(case)}",
        kernel=kernel,
        case=case,
        peers=_sdpa(sdpa_causal, FLASH, CUDNN),
        figures=Figures(rate=True),
    )


def _decodes(sizes: Sizes) -> list[Subject]:
    """One token over the ring, then over ever longer caches of a global layer."""
    kernel, case = use_of("window_decode", sizes.large, "decode", "local attention", context=sizes.large.window)
    peers = _sdpa(sdpa_decode, FLASH, CUDNN)
    name = f"decode over {case.dims['keys']} keys, {_heads(case)}"
    ring = Subject(name=name, kernel=kernel, case=case, peers=peers, figures=Figures(most_us=MOST_DECODE_US))
    found = [ring]
    for keys in sizes.keys:
        kernel, case = use_of("global_decode", sizes.large, "decode", "global attention", context=keys - 1)
        name = f"decode over {keys} keys, {_heads(case)}"
        found.append(Subject(name=name, kernel=kernel, case=case, peers=peers, figures=Figures(read_share=0.9)))
    return found


def _siglip(sizes: Sizes) -> Subject:
    kernel, case = use_of("siglip_attention", sizes.small, "vision", "vision attention", context=0)
    patches, heads, head_dim = (case.dims[name] for name in ("patches", "heads", "head_dim"))
    labels = (FLASH, CUDNN, EFFICIENT)
    return Subject(
        name=f"SigLIP attention, {patches}x{patches}, {heads} heads, D {head_dim}",
        kernel=kernel,
        case=case,
        peers=_sdpa(sdpa_siglip, *labels),
        figures=Figures(speed=(0.8, labels), rate=True),
    )


def _heads(case: Case) -> str:
    return f"{case.dims['heads']}/{case.dims['kv_heads']} heads, D {case.dims['head_dim']}"


def _sdpa(prepare: Callable[[SDPBackend], Prepare], *labels: str) -> tuple[Peer, ...]:
    return tuple(Peer(label=label, prepare=prepare(_BACKENDS[label]), returns="out") for label in labels)


def sdpa_causal(backend: SDPBackend) -> Prepare:
    """Of a chunk that begins the sequence."""

    def prepare(case: Case, t: Tensors) -> Callable[[], Tensor]:
        chunk = case.dims["chunk"]
        q_BNSD = t["q"].transpose(1, 2).contiguous()
        k_BGSD, v_BGSD = (t[name][:, :, :chunk].contiguous() for name in ("k_cache", "v_cache"))
        return _attend(backend, q_BNSD, k_BGSD, v_BGSD, case.dims["head_dim"] ** -0.5, causal=True)

    return prepare


def sdpa_decode(backend: SDPBackend) -> Prepare:
    """Of one token, which sees every key: its cache holds no others."""

    def prepare(case: Case, t: Tensors) -> Callable[[], Tensor]:
        keys = case.dims["keys"]
        q_BN1D = t["q"].transpose(1, 2).contiguous()
        k_BGKD, v_BGKD = (t[name][:, :, :keys].contiguous() for name in ("k_cache", "v_cache"))
        return _attend(backend, q_BN1D, k_BGKD, v_BGKD, case.dims["scale_dim"] ** -0.5)

    return prepare


def sdpa_siglip(backend: SDPBackend) -> Prepare:
    """Of patches that all see each other."""

    def prepare(case: Case, t: Tensors) -> Callable[[], Tensor]:
        q_IAPD, k_IAPD, v_IAPD = (part.transpose(1, 2).contiguous() for part in t["qkv"].unbind(2))
        return _attend(backend, q_IAPD, k_IAPD, v_IAPD, case.dims["head_dim"] ** -0.5)

    return prepare


def _attend(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False
) -> Callable[[], Tensor]:
    grouped = q.shape[1] != k.shape[1]

    def run() -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    return run


def flex_window(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """FlexAttention with the window as a block mask, compiled for these shapes."""
    q_BNSD, k_BGSD, v_BGSD = (t[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))
    mask = _block_mask(case.dims["chunk"], case.dims["window"], str(q_BNSD.device))
    compiled, scale = compiled_flex(), case.dims["head_dim"] ** -0.5

    def run() -> Tensor:
        out: Tensor = compiled(q_BNSD, k_BGSD, v_BGSD, block_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    return run


@cache
def _block_mask(chunk: int, window: int, device: str) -> BlockMask:
    """One for all copies of a case: another would be compiled for anew."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    return create_block_mask(visible, None, None, chunk, chunk, device=device)


@cache
def compiled_flex() -> Callable[..., Any]:
    """One compiled function for all copies of a case."""
    return torch.compile(flex_attention, mode=FLEX_MODE, dynamic=False)
