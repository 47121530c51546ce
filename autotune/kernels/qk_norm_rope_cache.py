"""From the fused projection to attention's operands: norms of q and k, rotation, and k and v to where they belong.

Legend: B batch, S tokens of the chunk, T = B S rows, N query heads, G key-value heads, D head_dim, E = D / 2, L slots of
a cache, X heads of a program; F = (N + 2 G) D: a row is [q heads, k heads, v heads].

    n = x / sqrt(mean(x**2) + eps) scale,    y = [n1 cos - n2 sin, n2 cos + n1 sin],   n = [n1, n2]
    cos, sin of position * frequency;  v is copied

The rows of a local layer's prefill go to chunk buffers [B, S, G, D], because its ring may only be written when attention
has read it (:mod:`autotune.kernels.cache_write`). Everything else writes slot position mod L of the cache at once:
that is the ring's slot, and the linear cache's, whose positions are below L. Padding (step >= length) and idle
sequences (position -1) write nothing into a cache; their q means nothing, but is written.

Rounding is transformers': the norm is rounded before the rotation, cos and sin are; sums and products are fp32. The
angle is the fp32 product that :mod:`autotune.kernels.rotary` makes. Its cos and sin are computed here rather than by the
library: every warp needs them for all heads, and the library's branch for large angles takes a stack.

Source: RoFormer (arXiv 2104.09864); Gemma 3 report (arXiv 2503.19786), section 2; reduction and polynomials of the angle
after Cody and Waite, Software Manual for the Elementary Functions, chapter 8, and Cephes (sinf.c).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.draw import Draw
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.cache_write import cache_write_oracle
from autotune.kernels.dependent import best_dependent, dependent_refusal, release, wait
from autotune.kernels.rms_norm import EPS, rms_norm_oracle
from autotune.kernels.rotary import inverse_frequencies, rotate
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor
from runtimes.errors import UsageError

HEAD_DIMS = (32, 64, 128, 256)
SLOTS_MULTIPLE = 256
"""A case's linear cache is what it holds, rounded up to this."""
_LONGEST = 131072


def qk_norm_rope_oracle(
    qkv_TF: Tensor,
    q_scale_D: Tensor,
    k_scale_D: Tensor,
    frequency_E: Tensor,
    start_B: Tensor,
    kv_heads: int,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The torch oracle: q [B, S, N, D], k and v [B, S, G, D], in the dtype of ``qkv_TF``."""
    batch, head_dim = start_B.shape[0], q_scale_D.shape[0]
    rows_BSXD = qkv_TF.view(batch, qkv_TF.shape[0] // batch, -1, head_dim)
    heads = rows_BSXD.shape[2] - 2 * kv_heads
    q, k, v = rows_BSXD.split([heads, kv_heads, kv_heads], dim=2)
    position_BS = start_B[:, None] + torch.arange(rows_BSXD.shape[1], device=start_B.device)
    angle_BSE = position_BS[:, :, None].float() * frequency_E
    table = (angle_BSE.cos(), angle_BSE.sin())
    q, k = (rotate(rms_norm_oracle(x, scale, eps), *table) for x, scale in ((q, q_scale_D), (k, k_scale_D)))
    return q.contiguous(), k.contiguous(), v.contiguous()


@triton.jit
def _cos_sin(angle):
    """Both of fp32 angles up to 2**17, to 3e-7: what is left of the nearest multiple of pi/2, then polynomials."""
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = tl.fma(quarters, -1.5703125, angle)  # exact, and so is the product even where it is rounded first
    rest = tl.fma(quarters, -4.837512969970703e-4, rest)
    rest = tl.fma(quarters, -7.549789948768648e-8, rest)
    z = rest * rest
    sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * rest + rest
    cos = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quarter = quarters.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _norm_and_rotate(
    row_ptr, scale_ptr, frequency_ptr, start_ptr, step, inside_X1, eps,
    HEAD_DIM: tl.constexpr, X: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Both halves of X heads, fp32, not yet rounded; waits for what the launch before this one writes."""
    half_E = tl.arange(0, HEAD_DIM // 2)
    offset_XE = tl.arange(0, X)[:, None] * HEAD_DIM + half_E[None, :]
    stored = row_ptr.dtype.element_ty
    scale1_E = tl.load(scale_ptr + half_E)
    scale2_E = tl.load(scale_ptr + HEAD_DIM // 2 + half_E)
    frequency_E = tl.load(frequency_ptr + half_E)
    wait(DEPENDENT)
    cos_E, sin_E = _cos_sin((tl.load(start_ptr) + step).to(tl.float32) * frequency_E)
    cos_E, sin_E = cos_E.to(stored).to(tl.float32), sin_E.to(stored).to(tl.float32)
    x1_XE = tl.load(row_ptr + offset_XE, inside_X1, other=0.0).to(tl.float32)
    x2_XE = tl.load(row_ptr + HEAD_DIM // 2 + offset_XE, inside_X1, other=0.0).to(tl.float32)
    inverse_X = tl.rsqrt((tl.sum(x1_XE * x1_XE, 1) + tl.sum(x2_XE * x2_XE, 1)) / HEAD_DIM + eps)
    n1_XE = (x1_XE * inverse_X[:, None] * scale1_E[None, :]).to(stored).to(tl.float32)
    n2_XE = (x2_XE * inverse_X[:, None] * scale2_E[None, :]).to(stored).to(tl.float32)
    y1_XE = n1_XE * cos_E[None, :] - n2_XE * sin_E[None, :]
    return y1_XE, n2_XE * cos_E[None, :] + n1_XE * sin_E[None, :]


@triton.jit
def _places(
    start_ptr, length_ptr, token, sequence, step, first, inside_X1, slots,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CACHE: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Where X rows of k or v go, and which of them do."""
    head_X1 = first + tl.arange(0, X)[:, None]
    if CACHE:
        position = tl.load(start_ptr) + step
        if length_ptr is None:
            real = position >= 0
        else:
            real = step < tl.load(length_ptr + sequence)
        return ((sequence * KV_HEADS + head_X1) * slots + position % slots) * HEAD_DIM, inside_X1 & real
    return (token * KV_HEADS + head_X1) * HEAD_DIM, inside_X1


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_scale_ptr, k_scale_ptr, frequency_ptr, start_ptr, length_ptr, q_ptr, k_ptr, v_ptr, tokens, slots, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CACHE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release(DEPENDENT)
    sequence = (tl.program_id(0) // tokens).to(tl.int64)
    step = tl.program_id(0) % tokens
    token = tl.program_id(0).to(tl.int64)
    start_ptr += sequence
    q_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    block = tl.program_id(1)
    row_ptr = qkv_ptr + token * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    head_X1 = tl.arange(0, BLOCK_HEADS)[:, None]
    half_1E = tl.arange(0, HEAD_DIM // 2)[None, :]
    if block < q_blocks:
        first = block * BLOCK_HEADS
        inside_X1 = head_X1 < HEADS - first
        y1_XE, y2_XE = _norm_and_rotate(
            row_ptr + first * HEAD_DIM, q_scale_ptr, frequency_ptr, start_ptr, step, inside_X1, eps,
            HEAD_DIM, BLOCK_HEADS, DEPENDENT,
        )  # fmt: skip
        to_XE = q_ptr + (token * HEADS + first) * HEAD_DIM + head_X1 * HEAD_DIM + half_1E
        tl.store(to_XE, y1_XE.to(q_ptr.dtype.element_ty), inside_X1)
        tl.store(to_XE + HEAD_DIM // 2, y2_XE.to(q_ptr.dtype.element_ty), inside_X1)
    else:
        first = (block - q_blocks) % kv_blocks * BLOCK_HEADS
        inside_X1 = head_X1 < KV_HEADS - first
        if block < q_blocks + kv_blocks:
            y1_XE, y2_XE = _norm_and_rotate(
                row_ptr + (HEADS + first) * HEAD_DIM, k_scale_ptr, frequency_ptr, start_ptr, step, inside_X1, eps,
                HEAD_DIM, BLOCK_HEADS, DEPENDENT,
            )  # fmt: skip
            offset_X1, kept_X1 = _places(
                start_ptr, length_ptr, token, sequence, step, first, inside_X1, slots,
                KV_HEADS, HEAD_DIM, CACHE, BLOCK_HEADS,
            )  # fmt: skip
            tl.store(k_ptr + offset_X1 + half_1E, y1_XE.to(k_ptr.dtype.element_ty), kept_X1)
            tl.store(k_ptr + offset_X1 + HEAD_DIM // 2 + half_1E, y2_XE.to(k_ptr.dtype.element_ty), kept_X1)
        else:
            wait(DEPENDENT)
            offset_X1, kept_X1 = _places(
                start_ptr, length_ptr, token, sequence, step, first, inside_X1, slots,
                KV_HEADS, HEAD_DIM, CACHE, BLOCK_HEADS,
            )  # fmt: skip
            dim_1D = tl.arange(0, HEAD_DIM)[None, :]
            from_XD = row_ptr + (HEADS + KV_HEADS + first + head_X1) * HEAD_DIM + dim_1D
            tl.store(v_ptr + offset_X1 + dim_1D, tl.load(from_XD, kept_X1), kept_X1)


def qk_norm_rope(
    qkv_TF: Tensor,
    q_scale_D: Tensor,
    k_scale_D: Tensor,
    frequency_E: Tensor,
    start_B: Tensor,
    *,
    heads: int,
    kv_heads: int,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """To chunk buffers: q [B, S, N, D], k and v [B, S, G, D]; arguments as :func:`qk_norm_rope_cache_` has them."""
    tensors = {"qkv": qkv_TF, "q_scale": q_scale_D, "k_scale": k_scale_D, "frequency": frequency_E, "start": start_B}
    batch, tokens, head_dim = _check(tensors, heads, kv_heads)
    tensors |= _outputs(batch, tokens, heads, kv_heads, head_dim, 0, qkv_TF.device)
    _launch(config or _default(batch * tokens, head_dim), tensors, heads, kv_heads, 0).run()
    return tensors["q"], tensors["k"], tensors["v"]


def qk_norm_rope_cache_(
    qkv_TF: Tensor,
    q_scale_D: Tensor,
    k_scale_D: Tensor,
    frequency_E: Tensor,
    start_B: Tensor,
    k_cache_BGLD: Tensor,
    v_cache_BGLD: Tensor,
    *,
    heads: int,
    length_B: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Writes k and v into their slots and returns q, bf16 [B, S, N, D].

    Args:
        qkv_TF: bf16 [B S, (N + 2 G) D], the fused projection's output; B is that of ``start_B``.
        q_scale_D, k_scale_D: fp32, 1 + w.
        frequency_E: fp32, :func:`autotune.kernels.rotary.inverse_frequencies` of the layer's kind.
        start_B: int32, position of each sequence's first token.
        k_cache_BGLD, v_cache_BGLD: bf16, written in place. A chunk of several tokens must fit below slot L.
        heads: N.
        length_B: int32, how many of the S tokens are real. None: all, but for idle sequences (position -1).
        config: None takes the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    tensors = {"qkv": qkv_TF, "q_scale": q_scale_D, "k_scale": k_scale_D, "frequency": frequency_E, "start": start_B}
    kv_heads, slots = k_cache_BGLD.shape[1], k_cache_BGLD.shape[2]
    batch, tokens, head_dim = _check(tensors, heads, kv_heads)
    if tokens > slots:
        raise UsageError(
            f"a chunk of {tokens} tokens does not fit a cache of {slots} slots",
            hint="a ring is written after attention, by autotune.kernels.cache_write",
        )
    for name, cache in (("k_cache", k_cache_BGLD), ("v_cache", v_cache_BGLD)):
        shape = (batch, kv_heads, slots, head_dim)
        check_tensor(name, cache, shape=shape, dtypes=(torch.bfloat16,), device=qkv_TF.device)
        tensors[name] = cache
    if length_B is not None:
        check_tensor("length", length_B, shape=(batch,), dtypes=(torch.int32,), device=qkv_TF.device)
        tensors["length"] = length_B
    tensors |= _outputs(batch, tokens, heads, kv_heads, head_dim, slots, qkv_TF.device)
    _launch(config or _default(batch * tokens, head_dim), tensors, heads, kv_heads, slots).run()
    return tensors["q"]


def _check(tensors: Tensors, heads: int, kv_heads: int) -> tuple[int, int, int]:
    """B, S and D of arguments that fit."""
    qkv_TF, device = tensors["qkv"], tensors["qkv"].device
    batch, rows, head_dim = tensors["start"].shape[0], qkv_TF.shape[0], tensors["q_scale"].shape[0]
    if rows % batch or head_dim not in HEAD_DIMS:
        raise UsageError(
            f"{rows} rows of {batch} sequences with heads of {head_dim} do not fit",
            hint=f"rows are a multiple of the sequences; head_dim is one of {', '.join(map(str, HEAD_DIMS))}",
        )
    width = (heads + 2 * kv_heads) * head_dim
    check_tensor("qkv", qkv_TF, shape=(rows, width), dtypes=(torch.bfloat16,), device=device)
    check_tensor("q_scale", tensors["q_scale"], shape=(head_dim,), dtypes=(torch.float32,), device=device)
    check_tensor("k_scale", tensors["k_scale"], shape=(head_dim,), dtypes=(torch.float32,), device=device)
    check_tensor("frequency", tensors["frequency"], shape=(head_dim // 2,), dtypes=(torch.float32,), device=device)
    check_tensor("start", tensors["start"], shape=(batch,), dtypes=(torch.int32,), device=device)
    return batch, rows // batch, head_dim


def _outputs(
    batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, slots: int, device: torch.device | str
) -> Tensors:
    counts = {"q": heads} if slots else {"q": heads, "k": kv_heads, "v": kv_heads}
    return {
        name: torch.empty((batch, tokens, count, head_dim), dtype=torch.bfloat16, device=device)
        for name, count in counts.items()
    }


def _launch(config: Config, tensors: Tensors, heads: int, kv_heads: int, slots: int) -> Launch:
    rows, block = tensors["qkv"].shape[0], config.constants["BLOCK_HEADS"]
    constants: dict[str, Any] = dict(config.constants) | {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": tensors["q_scale"].shape[0],
        "CACHE": slots > 0,
    }
    arguments: dict[str, Any] = {
        f"{name}_ptr": tensors[name] for name in ("qkv", "q_scale", "k_scale", "frequency", "start", "q")
    }
    arguments |= {f"{name}_ptr": tensors[f"{name}_cache" if slots else name] for name in ("k", "v")}
    (arguments if "length" in tensors else constants)["length_ptr"] = tensors.get("length")
    return Launch(
        function=_qk_norm_rope_kernel,
        grid=(rows, triton.cdiv(heads, block) + 2 * triton.cdiv(kv_heads, block), 1),
        arguments=arguments | {"tokens": rows // tensors["start"].shape[0], "slots": slots, "eps": EPS},
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        dependent=bool(config.constants["DEPENDENT"]),
    )


def _default(rows: int, head_dim: int, dependent: int = 0) -> Config:
    """A program a head where there are few rows, so that all are under way at once; many heads where there are many."""
    if rows <= 64:
        return Config(constants={"BLOCK_HEADS": 1, "DEPENDENT": dependent}, num_warps=1, num_stages=1)
    constants = {"BLOCK_HEADS": 8, "DEPENDENT": dependent}
    return Config(constants=constants, num_warps=4 if head_dim > 128 else 2, num_stages=1)


class QkNormRopeCache(Kernel):
    """Dims: ``batch``, ``tokens`` of each sequence, ``heads``, ``kv_heads``, ``head_dim``, ``slots`` of the cache that k and
    v go to (0: chunk buffers). One token a sequence is a decode step: idle sequences instead of lengths.
    """

    name: ClassVar[str] = "qk_norm_rope_cache"
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16",)
    stages: ClassVar[tuple[Stage, ...]] = ("prefill", "decode")
    source: ClassVar[tuple[str, ...]] = ("autotune.kernels.qk_norm_rope_cache",)

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage == "vision":
            return ()
        decode = stage == "decode"
        linear = triton.cdiv(context + decode, SLOTS_MULTIPLE) * SLOTS_MULTIPLE
        layers = (
            ("local", model.window if decode else 0, model.local_layers),
            ("global", linear, model.global_layers),
        )
        dims = {
            "batch": batch,
            "tokens": 1 if decode else context,
            "heads": model.heads,
            "kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
        }
        return tuple(
            Use(
                name=f"q and k of {kind} layers",
                case=Case(dtype="bfloat16", dims=dims | {"slots": slots}),
                count=count,
            )
            for kind, slots, count in layers
        )

    def bucket(self, case: Case) -> str:
        dims = case.dims
        rows = min(triton.next_power_of_2(dims["batch"] * dims["tokens"]), 1024)
        shape = f"heads={dims['heads']} kv_heads={dims['kv_heads']} head_dim={dims['head_dim']}"
        return f"{case.dtype} rows<={rows} {shape} to={'cache' if dims['slots'] else 'chunk'}"

    def space(self, case: Case) -> Space:
        constants = {"BLOCK_HEADS": (1, 2, 4, 8, 16), "DEPENDENT": (0, 1)}
        return Space(constants=constants, num_warps=(1, 2, 4, 8), num_stages=(1,))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        values = config.constants["BLOCK_HEADS"] * case.dims["head_dim"]
        if values > 64 * 32 * config.num_warps:
            return f"{values} values in {config.num_warps} warps take more than 64 registers a thread"
        return dependent_refusal(config.constants["DEPENDENT"], gpu)

    def default(self, case: Case, gpu: Gpu) -> Config:
        return _default(case.dims["batch"] * case.dims["tokens"], case.dims["head_dim"], best_dependent(gpu))

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        batch, tokens, heads, kv_heads, head_dim, slots = (
            case.dims[name] for name in ("batch", "tokens", "heads", "kv_heads", "head_dim", "slots")
        )
        shapes: dict[str, tuple[int, ...]] = {"qkv": (batch * tokens, (heads + 2 * kv_heads) * head_dim)}
        if slots:
            shapes["k_cache"] = shapes["v_cache"] = (batch, kv_heads, slots, head_dim)
        draw = Draw(device, seed)
        tensors = {name: draw.normal(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        tensors |= {name: draw.scale(head_dim) for name in ("q_scale", "k_scale")}
        tensors["frequency"] = inverse_frequencies(head_dim, 10_000.0, 1.0, device)
        latest = slots if slots and tokens > 1 else _LONGEST
        tensors["start"] = draw.integers(batch, high=latest - tokens + 1)
        if tokens > 1:
            tensors["length"] = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        return tensors

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        batch, tokens, heads, kv_heads, head_dim, slots = (
            case.dims[name] for name in ("batch", "tokens", "heads", "kv_heads", "head_dim", "slots")
        )
        return _outputs(batch, tokens, heads, kv_heads, head_dim, slots, device)

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        return (_launch(config, tensors, case.dims["heads"], case.dims["kv_heads"], case.dims["slots"]),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        qkv, scales, start = inputs["qkv"], (inputs["q_scale"], inputs["k_scale"]), inputs["start"]
        q, k, v = qk_norm_rope_oracle(qkv, *scales, inputs["frequency"], start, case.dims["kv_heads"])
        if not case.dims["slots"]:
            return {"q": q, "k": k, "v": v}
        length = inputs["length"] if "length" in inputs else (start >= 0).int()
        return {
            "q": q,
            "k_cache": cache_write_oracle(k, inputs["k_cache"], start, length),
            "v_cache": cache_write_oracle(v, inputs["v_cache"], start, length),
        }

    def cost(self, case: Case) -> Cost:
        dims = case.dims
        rows = dims["batch"] * dims["tokens"] * dims["head_dim"]
        values = rows * (dims["heads"] + 2 * dims["kv_heads"])
        return Cost(bytes=2 * 2 * values, flops=10 * rows * (dims["heads"] + dims["kv_heads"]))
