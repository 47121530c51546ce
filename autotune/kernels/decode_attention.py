"""Attention of one token a sequence over a cache that holds it already: what both decode kernels share.

Legend: B batch, N query heads, G key-value heads, R = N / G heads of a group (padded to a power of two, and to 16 where
a product needs it), D head_dim, L slots of the cache, K keys of a block, P splits of the keys.

    out = softmax_j(scale * q . k_j) v_j    over the slots j < min(position + 1, L)

Softmax does not ask for an order, so that a ring that has wrapped is read like a linear cache. The older keys of a
sequence are dealt out to P programs in whole blocks, as evenly as blocks allow, whatever its length; a program without a
block leaves at once, and so does every program of an idle sequence (position -1) but the one that writes its zeros. A
program takes all R heads that share a key-value head: keys and values are read once. Slots past the position are never
read.

The token's own key and value stand apart: they, and q, are what the launch just before has written. All others are of an
earlier step, and so is the position (where a launch writes it, that is the last one of a step). A dependent launch asks
for its first blocks while the one before it still runs; the wait stands in the loop, behind the loads that the pipeline
begins with. The last program of a sequence then starts its softmax with the token's own key, which the blocks leave out.

Each program stores its own normalised output and the base-2 logarithm of its sum. The last one of a sequence and head
to arrive joins them:

    out = sum_p 2**(lse_p - lse) out_p,    2**lse = sum_p 2**lse_p

A second launch would cost as much as reading 1024 keys does. Every program stores its part, waits for its other threads,
and then counts itself in by an atomic addition that releases and acquires at the GPU's scope; the last one reads past
the first-level cache, and leaves the counter at zero.

Source: FlashAttention-2 (arXiv 2307.08691); split keys as in Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from autotune.chosen import chosen_config
from autotune.draw import Draw
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.dependent import best_dependent, dependent_refusal, release, wait
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor
from runtimes.errors import UsageError

LOG2_E = 1.4426950408889634
HEAD_DIMS = (16, 32, 64, 128, 256)
PRODUCT_ROWS = 16
"""Rows of the least matrix product; those past R are zeros."""
_WIDE_BYTES = 147456
_JOINED_VALUES = 8192
"""Of the parts, what a program holds at a time when it joins them, at most 64 in a thread's registers."""


def decode_oracle(q_B1ND: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, position_B: Tensor, scale: float) -> Tensor:
    """The torch oracle: [B, 1, N, D], in the dtype of ``q_B1ND``; zeros for an idle sequence."""
    seen_BL = torch.arange(k_BGLD.shape[2], device=q_B1ND.device) <= position_B[:, None]
    k_BGLD, v_BGLD = (torch.where(seen_BL[:, None, :, None], rows, 0) for rows in (k_BGLD, v_BGLD))
    idle_B111 = (position_B < 0)[:, None, None, None]
    mask_B11L = seen_BL[:, None, None, :] | idle_B111
    out_BN1D = F.scaled_dot_product_attention(
        q_B1ND.transpose(1, 2), k_BGLD, v_BGLD, attn_mask=mask_B11L, scale=scale, enable_gqa=True
    )
    return torch.where(idle_B111, 0, out_BN1D).transpose(1, 2).contiguous()


@triton.jit
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, out_ptr, partial_ptr, lse_ptr, arrived_ptr, slots, kv_heads, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr, COMBINE: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release(DEPENDENT)
    split = tl.program_id(0)
    group = tl.program_id(2) * kv_heads + tl.program_id(1)
    dim_D = tl.arange(0, HEAD_DIM)
    member_R = tl.arange(0, ROWS)
    inside_R1 = (member_R < GROUP)[:, None]
    offset_RD = member_R[:, None] * HEAD_DIM + dim_D[None, :]
    position = tl.load(position_ptr + tl.program_id(2))
    newest = position % slots  # -1 of an idle sequence
    older = tl.minimum(position, slots)  # slots below it may be read, but for the newest
    blocks = tl.maximum(tl.cdiv(older, BLOCK_K), 1)
    active = tl.minimum(blocks, SPLITS)
    if split >= active:
        return
    each = blocks // SPLITS
    left_over = blocks % SPLITS
    begin = split * each + tl.minimum(split, left_over)
    end = begin + each + (split < left_over).to(tl.int32)
    k_ptr += group.to(tl.int64) * slots * HEAD_DIM
    v_ptr += group.to(tl.int64) * slots * HEAD_DIM

    q_RD = tl.zeros([ROWS, HEAD_DIM], q_ptr.dtype.element_ty)
    max_R = tl.full([ROWS], -float("inf"), tl.float32)
    sum_RK = tl.zeros([ROWS, BLOCK_K], tl.float32)  # summed over K once, at the end
    acc_RD = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        key_K = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside_K = (key_K < older) & (key_K != newest)
        offset_KD = key_K[:, None] * HEAD_DIM + dim_D[None, :]
        k_KD = tl.load(k_ptr + offset_KD, inside_K[:, None], other=0.0)
        v_KD = tl.load(v_ptr + offset_KD, inside_K[:, None], other=0.0)
        if block == begin:
            wait(DEPENDENT)
            # An idle sequence sees one key, of zeros, with a query of zeros.
            q_RD = tl.load(q_ptr + group * (GROUP * HEAD_DIM) + offset_RD, inside_R1 & (position >= 0), other=0.0)
            if split == active - 1:
                there_D = (dim_D < HEAD_DIM) & (position >= 0)
                k_D = tl.load(k_ptr + newest * HEAD_DIM + dim_D, there_D, other=0.0).to(tl.float32)
                v_D = tl.load(v_ptr + newest * HEAD_DIM + dim_D, there_D, other=0.0).to(tl.float32)
                max_R = tl.sum(q_RD.to(tl.float32) * k_D[None, :], 1) * scale_log2
                sum_RK += (tl.arange(0, BLOCK_K) == 0).to(tl.float32)[None, :]
                acc_RD += v_D[None, :]
        s_RK = tl.where(inside_K[None, :], tl.dot(q_RD, tl.trans(k_KD)) * scale_log2, -float("inf"))
        new_R = tl.maximum(max_R, tl.max(s_RK, 1))
        keep_R1 = tl.exp2(max_R - new_R)[:, None]
        p_RK = tl.exp2(s_RK - new_R[:, None])
        sum_RK = sum_RK * keep_R1 + p_RK
        acc_RD = tl.dot(p_RK.to(v_KD.dtype), v_KD, acc_RD * keep_R1)
        max_R = new_R
    sum_R = tl.sum(sum_RK, 1)
    _deliver(
        acc_RD / sum_R[:, None], max_R + tl.log2(sum_R), partial_ptr, lse_ptr, arrived_ptr, out_ptr,
        group, split, active, GROUP, HEAD_DIM, ROWS, GROUP_ROWS, SPLITS, COMBINE,
    )  # fmt: skip


@triton.jit
def _deliver(
    o_RD, lse_R, partial_ptr, lse_ptr, arrived_ptr, out_ptr, group, split, active,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr, SPLITS: tl.constexpr,
    COMBINE: tl.constexpr,
):  # fmt: skip
    """Stores the output where a program is the only one, else its part; the last to come joins them."""
    member_R = tl.arange(0, ROWS)
    inside_R1 = (member_R < GROUP)[:, None]
    offset_RD = member_R[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    out_ptr += group * (GROUP * HEAD_DIM)
    if active == 1:
        tl.store(out_ptr + offset_RD, o_RD.to(out_ptr.dtype.element_ty), inside_R1)
    elif SPLITS > 1:
        partial_ptr += group.to(tl.int64) * (SPLITS * GROUP * HEAD_DIM)
        lse_ptr += group * (SPLITS * GROUP)
        tl.store(partial_ptr + split * (GROUP * HEAD_DIM) + offset_RD, o_RD, inside_R1)
        tl.store(lse_ptr + split * GROUP + member_R, lse_R, member_R < GROUP)
        tl.debug_barrier()  # the stores of all threads come before the one thread's addition
        if tl.atomic_add(arrived_ptr + group, 1, sem="acq_rel", scope="gpu") == active - 1:
            tl.store(arrived_ptr + group, 0)
            _combine(partial_ptr, lse_ptr, out_ptr, active, GROUP, HEAD_DIM, GROUP_ROWS, COMBINE)


@triton.jit
def _combine(
    partial_ptr, lse_ptr, out_ptr, active,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """Joins the parts of ``active`` splits, COMBINE at a time, both loads of a step on their way at once.

    Heads come before parts, so that the threads of four warps share out the columns of all heads, and the sum over parts
    stays within a thread.
    """
    dim_D = tl.arange(0, HEAD_DIM)
    member_R = tl.arange(0, ROWS)
    max_R = tl.full([ROWS], -float("inf"), tl.float32)
    sum_R = tl.zeros([ROWS], tl.float32)
    acc_RD = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for first in tl.range(0, active, COMBINE):
        split_P = first + tl.arange(0, COMBINE)
        inside_RP = (member_R < GROUP)[:, None] & (split_P < active)[None, :]
        row_RP = member_R[:, None] + split_P[None, :] * GROUP
        offset_RPD = row_RP[:, :, None] * HEAD_DIM + dim_D[None, None, :]
        lse_RP = tl.load(lse_ptr + row_RP, inside_RP, other=-float("inf"), cache_modifier=".cg")
        o_RPD = tl.load(partial_ptr + offset_RPD, inside_RP[:, :, None], other=0.0, cache_modifier=".cg")
        new_R = tl.maximum(max_R, tl.max(lse_RP, 1))
        keep_R = tl.exp2(max_R - new_R)
        weight_RP = tl.exp2(lse_RP - new_R[:, None])
        sum_R = sum_R * keep_R + tl.sum(weight_RP, 1)
        acc_RD = acc_RD * keep_R[:, None] + tl.sum(weight_RP[:, :, None] * o_RPD, 1)
        max_R = new_R
    o_RD = acc_RD / sum_R[:, None]
    offset_RD = member_R[:, None] * HEAD_DIM + dim_D[None, :]
    tl.store(out_ptr + offset_RD, o_RD.to(out_ptr.dtype.element_ty), (member_R < GROUP)[:, None])


def decode(
    kernel: DecodeAttention,
    q_B1ND: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    position_B: Tensor,
    *,
    scale: float,
    config: Config | None,
) -> Tensor:
    """Checks, allocates the workspaces, launches; without a configuration by the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    if k_BGLD.dim() != 4 or q_B1ND.dim() != 4:
        raise UsageError(
            f"q must be [B, 1, N, D] and the caches [B, G, slots, D], but they are {tuple(q_B1ND.shape)} and {tuple(k_BGLD.shape)}"
        )
    batch, kv_heads, slots, head_dim = k_BGLD.shape
    heads = q_B1ND.shape[2]
    if heads % kv_heads or heads // kv_heads > PRODUCT_ROWS or head_dim not in HEAD_DIMS:
        raise UsageError(
            f"{heads} query heads over {kv_heads} key-value heads of {head_dim} do not fit the decode kernels",
            hint=f"a group has 1 to {PRODUCT_ROWS} query heads; head_dim is one of {', '.join(map(str, HEAD_DIMS))}",
        )
    expected = {"q": (q_B1ND, (batch, 1, heads, head_dim)), "k": (k_BGLD, k_BGLD.shape), "v": (v_BGLD, k_BGLD.shape)}
    for name, (tensor, shape) in expected.items():
        check_tensor(name, tensor, shape=shape, dtypes=(torch.bfloat16,), device=q_B1ND.device)
    check_tensor("position", position_B, shape=(batch,), dtypes=(torch.int32,), device=q_B1ND.device)
    if config is None:  # how many keys there are stands on the GPU: as many as there are slots, at most
        dims = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        dims |= {"slots": slots, "keys": slots, "scale_dim": head_dim}
        config = chosen_config(kernel, Case(dtype="bfloat16", dims=dims), q_B1ND.device)
    written = _outputs(batch, heads, kv_heads, head_dim, config, q_B1ND.device)
    tensors = {"q": q_B1ND, "k_cache": k_BGLD, "v_cache": v_BGLD, "position": position_B} | written
    _launch(config, tensors, scale).run()
    return written["out"]


def _outputs(
    batch: int, heads: int, kv_heads: int, head_dim: int, config: Config, device: torch.device | str
) -> Tensors:
    part = (batch, kv_heads, config.constants["SPLITS"], heads // kv_heads)
    return {
        "out": torch.empty((batch, 1, heads, head_dim), dtype=torch.bfloat16, device=device),
        "_partial": torch.empty((*part, head_dim), device=device),
        "_lse": torch.empty(part, device=device),
        "_zero_arrived": torch.zeros((batch, kv_heads), dtype=torch.int32, device=device),
    }


def _launch(config: Config, tensors: Tensors, scale: float) -> Launch:
    batch, kv_heads, slots, head_dim = tensors["k_cache"].shape
    group = tensors["q"].shape[2] // kv_heads
    splits = config.constants["SPLITS"]
    group_rows = triton.next_power_of_2(group)
    held = min(_JOINED_VALUES, 64 * 32 * config.num_warps) // (group_rows * head_dim)
    constants: dict[str, Any] = dict(config.constants) | {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "ROWS": PRODUCT_ROWS,
        "GROUP_ROWS": group_rows,
        "COMBINE": max(1, min(triton.next_power_of_2(splits), held)),
        "STAGES": config.num_stages,
    }
    return Launch(
        function=_decode_attention_kernel,
        grid=(splits, kv_heads, batch),
        arguments={
            "q_ptr": tensors["q"],
            "k_ptr": tensors["k_cache"],
            "v_ptr": tensors["v_cache"],
            "position_ptr": tensors["position"],
            "out_ptr": tensors["out"],
            "partial_ptr": tensors["_partial"],
            "lse_ptr": tensors["_lse"],
            "arrived_ptr": tensors["_zero_arrived"],
            "slots": slots,
            "kv_heads": kv_heads,
            "scale_log2": scale * LOG2_E,
        },
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        dependent=bool(config.constants["DEPENDENT"]),
    )


class DecodeAttention(Kernel):
    """Dims: ``batch``, ``heads``, ``kv_heads``, ``head_dim``, ``slots`` of the cache, ``keys`` seen by every sequence,
    ``scale_dim``: scores are divided by its root.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16",)
    stages: ClassVar[tuple[Stage, ...]] = ("decode",)
    SPLITS: ClassVar[tuple[int, ...]]
    """Numbers of splits worth a try, 1 among them."""
    PROGRAMS: ClassVar[int]
    """How many programs for each multiprocessor the heuristic starts."""
    WIDE: ClassVar[bool]
    """Whether the heuristic prefers blocks of 64 keys."""

    def use(self, name: str, model: ModelShapes, count: int, *, batch: int, slots: int, keys: int) -> tuple[Use, ...]:
        """The one case of a step."""
        dims = {"batch": batch, "heads": model.heads, "kv_heads": model.kv_heads, "head_dim": model.head_dim}
        dims |= {"slots": slots, "keys": keys, "scale_dim": model.query_pre_attn_scalar}
        return (Use(name=name, case=Case(dtype="bfloat16", dims=dims), count=count),)

    def heuristic(self, batch: int, kv_heads: int, slots: int, gpu: Gpu) -> Config:
        """Long caches in blocks of 64 keys where the GPU has the 147 KB of shared memory that they take at head_dim 256."""
        wide = self.WIDE and gpu.shared_bytes >= _WIDE_BYTES
        block = 64 if wide else 32
        most = max(1, min(self.PROGRAMS * gpu.multiprocessors // (batch * kv_heads), triton.cdiv(slots, block)))
        splits = max(count for count in self.SPLITS if count <= most)
        constants = {"SPLITS": splits, "BLOCK_K": block, "DEPENDENT": best_dependent(gpu)}
        return Config(constants=constants, num_warps=8 if wide else 4, num_stages=2 if splits * block >= slots else 3)

    def default(self, case: Case, gpu: Gpu) -> Config:
        return self.heuristic(case.dims["batch"], case.dims["kv_heads"], case.dims["slots"], gpu)

    def bucket(self, case: Case) -> str:
        dims = case.dims
        keys, batch = triton.next_power_of_2(dims["keys"]), triton.next_power_of_2(dims["batch"])
        shape = f"heads={dims['heads']} kv_heads={dims['kv_heads']} head_dim={dims['head_dim']}"
        return f"{case.dtype} batch<={batch} {shape} keys<={max(keys, 512)}"

    def space(self, case: Case) -> Space:
        most = triton.cdiv(case.dims["slots"], 16)
        splits = tuple(count for count in self.SPLITS if count <= most)
        constants = {"SPLITS": splits, "BLOCK_K": (16, 32, 64, 128), "DEPENDENT": (0, 1)}
        return Space(constants=constants, num_warps=(2, 4, 8), num_stages=(2, 3, 4, 5))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        block, head_dim = config.constants["BLOCK_K"], case.dims["head_dim"]
        buffers = max(1, config.num_stages - 1) * 2 * block * head_dim
        shared = 2 * (buffers + PRODUCT_ROWS * (head_dim + max(block, head_dim)))
        if shared > gpu.shared_bytes:
            return f"takes {shared} bytes of shared memory; {gpu.name} has {gpu.shared_bytes} for a program"
        if block * head_dim > 32 * 8 * 32 * config.num_warps:
            return f"a block of {block} keys is loaded through more than 32 addresses by each thread of {config.num_warps} warps"
        return dependent_refusal(config.constants["DEPENDENT"], gpu)

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        batch, heads, kv_heads, head_dim, slots, keys = (
            case.dims[name] for name in ("batch", "heads", "kv_heads", "head_dim", "slots", "keys")
        )
        draw, cache = Draw(device, seed), (batch, kv_heads, slots, head_dim)
        tensors = {name: draw.normal(*cache, dtype=torch.bfloat16) for name in ("k_cache", "v_cache")}
        for cached in tensors.values():
            cached[:, :, keys:] = float("nan")  # what was never written may hold anything
        tensors["q"] = draw.normal(batch, 1, heads, head_dim, dtype=torch.bfloat16)
        return tensors | {"position": torch.full((batch,), keys - 1, dtype=torch.int32, device=device)}

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        dims = case.dims
        return _outputs(dims["batch"], dims["heads"], dims["kv_heads"], dims["head_dim"], config, device)

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        return (_launch(config, tensors, case.dims["scale_dim"] ** -0.5),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        scale = case.dims["scale_dim"] ** -0.5
        out = decode_oracle(inputs["q"], inputs["k_cache"], inputs["v_cache"], inputs["position"], scale)
        return {"out": out}

    def cost(self, case: Case) -> Cost:
        dims = case.dims
        cache = dims["batch"] * dims["kv_heads"] * dims["keys"] * dims["head_dim"]
        rows = dims["batch"] * dims["heads"] * dims["head_dim"]
        return Cost(bytes=2 * (2 * cache + 2 * rows), flops=4 * rows * dims["keys"])
