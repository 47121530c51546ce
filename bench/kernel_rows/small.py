"""The small kernels against what one writes in torch, without a figure to reach.

Legend: T rows, H hidden, B sequences, S tokens of each, N query heads, G key-value heads, D head_dim, E = D / 2, V
vocabulary, K tokens kept, P patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.kernel import Case, Stage, Tensors
from bench.kernel_rows.subject import Peer, Sizes, Subject, use_of

TORCH = "torch"
EPS = 1e-6


def subjects(sizes: Sizes) -> list[Subject]:
    """Of the large model, a token's and a chunk's; of SigLIP, one image's."""
    stages: tuple[tuple[Stage, int], ...] = (("decode", sizes.keys[0] - 1), ("prefill", sizes.chunk))
    found = []
    for stage, context in stages:
        found += [
            _subject("rms_norm", sizes, stage, "norms and residual", context, norms, "y"),
            _subject("qk_norm_rope_cache", sizes, stage, "q and k of local layers", context, norm_and_rotate, "q"),
            _subject("embed", sizes, stage, "embeddings", context, look_up, "y"),
        ]
    found += [
        _subject("patch_embed", sizes, "vision", "patch embedding", 0, convolve, "y"),
        _subject("siglip_pool", sizes, "vision", "pooling", 0, pool, "y"),
    ]
    return found + _samplings(sizes)


def _subject(
    name: str,
    sizes: Sizes,
    stage: Stage,
    where: str,
    context: int,
    prepare: Callable[[Case, Tensors], Callable[[], Tensor]],
    returns: str,
) -> Subject:
    kernel, case = use_of(name, sizes.large, stage, where, context=context)
    peer = Peer(label=TORCH, prepare=prepare, returns=returns)
    return Subject(name=f"{name}, {case}", kernel=kernel, case=case, peers=(peer,))


def _samplings(sizes: Sizes) -> list[Subject]:
    """Greedy, and with the recommended filters."""
    kernel, drawn = use_of("sample", sizes.large, "decode", "sampling", context=1)
    greedy = replace(drawn, dims={**drawn.dims, "temperature": 0})
    d = drawn.dims
    return [
        Subject(
            name=f"sample, argmax of {d['vocab']}",
            kernel=kernel,
            case=greedy,
            peers=(Peer(label="torch.argmax", prepare=argmax, returns="token"),),
        ),
        Subject(
            name=f"sample, top-k {d['top_k']} and top-p {d['top_p'] / 100:g} of {d['vocab']}",
            kernel=kernel,
            case=drawn,
            peers=(Peer(label=TORCH, prepare=filter_and_draw),),
        ),
    ]


def norms(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """Post-norm, residual sum, and the norm that comes next."""
    x_TH, h_TH = t["x"], t["h"]
    scale_H, next_scale_H = (t[name].to(x_TH.dtype) for name in ("scale", "next_scale"))
    shape = (x_TH.shape[1],)

    def run() -> Tensor:
        return F.rms_norm(h_TH + F.rms_norm(x_TH, shape, scale_H, EPS), shape, next_scale_H, EPS)

    return run


def norm_and_rotate(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """Norms and rotation of q and k by a table made beforehand; k and v written to their slots, or left as a chunk."""
    d = case.dims
    qkv = t["qkv"].view(d["batch"], d["tokens"], -1, d["head_dim"])
    q_BSND, k_BSGD, v_BSGD = torch.split(qkv, [d["heads"], d["kv_heads"], d["kv_heads"]], dim=2)
    q_scale_D, k_scale_D = (t[name].to(qkv.dtype) for name in ("q_scale", "k_scale"))
    position_S = t["start"][0] + torch.arange(d["tokens"], device=qkv.device)
    angle_SE = position_S[:, None].float() * t["frequency"]
    cos_S1E, sin_S1E = (table.to(qkv.dtype)[:, None] for table in (angle_SE.cos(), angle_SE.sin()))
    slot_S = position_S.long() % max(d["slots"], 1)

    def turned(x: Tensor, scale_D: Tensor) -> Tensor:
        x1, x2 = F.rms_norm(x, (d["head_dim"],), scale_D, EPS).chunk(2, dim=-1)
        return torch.cat([x1 * cos_S1E - x2 * sin_S1E, x2 * cos_S1E + x1 * sin_S1E], dim=-1)

    def run() -> Tensor:
        q, k = turned(q_BSND, q_scale_D), turned(k_BSGD, k_scale_D)
        if d["slots"]:
            t["k_cache"].index_copy_(2, slot_S, k.transpose(1, 2))
            t["v_cache"].index_copy_(2, slot_S, v_BSGD.transpose(1, 2))
        else:
            v_BSGD.contiguous()
        return q

    return run


def look_up(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """Rows of the table times sqrt(H), and image features in the place of some."""
    factor = torch.tensor(case.dims["hidden"] ** 0.5, dtype=t["table"].dtype).item()

    def run() -> Tensor:
        y_TH = F.embedding(t["ids"], t["table"]) * factor
        if case.dims["features"]:
            rows_T = t["feature_rows"]
            y_TH = torch.where((rows_T >= 0)[:, None], F.embedding(rows_T.clamp(min=0), t["features"]), y_TH)
        return y_TH

    return run


def convolve(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """A convolution, then the positions."""

    def run() -> Tensor:
        weight = t["weight"]
        y_NHpp = F.conv2d(t["pixels"].to(weight.dtype), weight, t["bias"], stride=case.dims["patch"])
        return y_NHpp.flatten(2).transpose(1, 2) + t["position"]

    return run


def pool(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """The mean of squares of patches, then RMSNorm."""
    x_NPH, side = t["x"], case.dims["side"]
    scale_H = t["scale"].to(x_NPH.dtype)

    def run() -> Tensor:
        x_NHpp = x_NPH.transpose(1, 2).reshape(-1, x_NPH.shape[2], side, side)
        x_NTH = F.avg_pool2d(x_NHpp, case.dims["pool"]).flatten(2).transpose(1, 2)
        return F.rms_norm(x_NTH, (x_NTH.shape[2],), scale_H, EPS)

    return run


def argmax(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """The largest logit's place."""
    return lambda: t["logits"].argmax(-1)


def filter_and_draw(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """Top-k, softmax, top-p, and a draw by the exponential race, which needs no copy to the host."""
    top_k, top_p, temperature = case.dims["top_k"], case.dims["top_p"] / 100, case.dims["temperature"] / 100

    def run() -> Tensor:
        logits_BK, ids_BK = t["logits"].topk(top_k)
        weights_BK = torch.softmax(logits_BK / temperature, -1)
        before_BK = weights_BK.cumsum(-1) - weights_BK
        kept_BK = torch.where(before_BK < top_p, weights_BK, 0.0)
        winner_B1 = (kept_BK / torch.empty_like(kept_BK).exponential_()).argmax(-1, keepdim=True)
        return ids_BK.gather(1, winner_B1)

    return run
