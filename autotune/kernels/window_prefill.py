"""Prefill of local layers: a chunk's queries over a ring of the W tokens before it, and over the chunk.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, W window; a tile has M rows, a
block K keys.

    out_s = softmax_j(scale * q_s . k_j) v_j    over keys j with position p_j such that
    p_s - W < p_j < max(p_s + 1, end of the image that s belongs to)

The ring holds position p in slot p mod W, as it was before the chunk; the chunk's own keys are read from k and v.
A tile takes the blocks that its rows see and no others. Padding rows are stored as zeros.

Source: Gemma 3 report (arXiv 2503.19786), section 2; FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.kernel import Case, Config, Cost, Stage, Tensors, Use
from autotune.kernels.prefill_attention import (
    LOWEST,
    attend_block,
    attend_rows,
    ends_of,
    load_queries,
    load_rows,
    prefill_launch,
    store_rows,
    tile_of,
    without_padding,
)
from autotune.kernels.prefill_space import PrefillKernel, chunk_tensors, spoil_unwritten
from autotune.kernels.sliding_window_attention import sliding_window_attention
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes

_READS = ("q", "k", "v", "k_cache", "v_cache")


def window_prefill_oracle(inputs: Tensors, scale: float) -> Tensor:
    """The torch oracle: [B, S, N, D], in the dtype of q; zeros in padding rows."""
    t = inputs
    start_B, length_B = t["start"].long(), t["length"].long()
    out_BSND, _, _ = sliding_window_attention(
        t["q"], t["k"], t["v"], t["k_cache"], t["v_cache"], start_B, length_B, t.get("image_ids"),
        t["k_cache"].shape[2], scale,
    )  # fmt: skip
    return without_padding(out_BSND, length_B)


@triton.jit
def _attend_ring(
    q_MD, k, v, start, first_query, low_M, acc_MD, max_M, sum_M, scale,
    WINDOW: tl.constexpr, K: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Attends to what the ring holds from before the chunk.

    The positions that the tile's first query still sees lie from one slot to another, perhaps around the end.
    ``low_M`` and positions count from the chunk's first token: a slot's lies between -W and -1.
    """
    filled = tl.minimum(start, WINDOW)
    blocks = (filled + K - 1) // K
    newest = (start - 1) % WINDOW
    oldest = tl.maximum(start + first_query - WINDOW + 1, 0) % WINDOW
    begin = oldest // K
    count = newest // K - begin + 1
    count = tl.minimum(tl.where(oldest > newest, count + blocks, count), blocks)
    for step in range(count):
        block = begin + step
        slot = tl.where(block < blocks, block, block - blocks) * K
        slot_K = slot + tl.arange(0, K)
        position_K = slot_K - newest - 1 - tl.where(slot_K > newest, WINDOW, 0)
        held_K = (slot_K < WINDOW) & (position_K >= -start)
        visible_MK = held_K[None, :] & (position_K[None, :] > low_M[:, None])
        k_KD = load_rows(k, D, slot, filled, K, D, TMA, True)
        v_KD = load_rows(v, D, slot, filled, K, D, TMA, True)
        acc_MD, max_M, sum_M = attend_block(q_MD, k_KD, v_KD, visible_MK, acc_MD, max_M, sum_M, scale, True)
    return acc_MD, max_M, sum_M


@triton.jit
def _window_prefill_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, start_ptr, length_ptr, visible_end_ptr, out_ptr, chunk, slots, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, IMAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr, TMA: tl.constexpr, MASK_ALL: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    first, head, query_M, head_M = tile_of(PACK, BLOCK_M)
    start = tl.load(start_ptr + batch)
    length = tl.load(length_ptr + batch)
    end_M, end = ends_of(visible_end_ptr, batch, query_M, first, length, chunk, IMAGES, BLOCK_M // PACK)
    q_MD = load_queries(q_ptr, batch, query_M, head_M, chunk, HEADS, HEAD_DIM)
    acc_MD = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    max_M = tl.full([BLOCK_M], LOWEST, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    kv_head = head // (HEADS // KV_HEADS)
    low_M = query_M - WINDOW

    stride = KV_HEADS * HEAD_DIM
    offset = batch.to(tl.int64) * chunk * stride + kv_head * HEAD_DIM
    if TMA:
        rows = tl.maximum(length, 1)
        k = tl.make_tensor_descriptor(k_ptr + offset, [rows, HEAD_DIM], [stride, 1], [BLOCK_N, HEAD_DIM])
        v = tl.make_tensor_descriptor(v_ptr + offset, [rows, HEAD_DIM], [stride, 1], [BLOCK_N, HEAD_DIM])
    else:
        k = k_ptr + offset
        v = v_ptr + offset
    # Every row sees all keys from its window's lower edge, for the last row the highest, to the first row.
    key = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    full_begin = (tl.maximum(first + BLOCK_M // PACK - WINDOW, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    acc_MD, max_M, sum_M = attend_rows(
        q_MD, k, v, stride, length, key, full_begin, tl.minimum(first + 1, end), end, low_M, end_M,
        acc_MD, max_M, sum_M, scale, True, BLOCK_N, HEAD_DIM, TMA, MASK_ALL,
    )  # fmt: skip

    if (start > 0) & (first < WINDOW - 1) & (first < length):
        offset = (batch * KV_HEADS + kv_head).to(tl.int64) * WINDOW * HEAD_DIM
        if TMA:
            rows = tl.minimum(start, WINDOW)
            k = tl.make_tensor_descriptor(k_cache_ptr + offset, [rows, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_N, HEAD_DIM])
            v = tl.make_tensor_descriptor(v_cache_ptr + offset, [rows, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_N, HEAD_DIM])
        else:
            k = k_cache_ptr + offset
            v = v_cache_ptr + offset
        acc_MD, max_M, sum_M = _attend_ring(
            q_MD, k, v, start, first, low_M, acc_MD, max_M, sum_M, scale, WINDOW, BLOCK_N, HEAD_DIM, TMA
        )  # fmt: skip
    store_rows(out_ptr, acc_MD, sum_M, batch, query_M, head_M, length, chunk, HEADS, HEAD_DIM)


def window_prefill(
    q_BSND: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    k_cache_BGWD: Tensor,
    v_cache_BGWD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    *,
    image_ids_BS: Tensor | None = None,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """The attention of a chunk: bf16 [B, S, N, D]; zeros in padding rows.

    Args:
        k_cache_BGWD, v_cache_BGWD: the ring before the chunk; slots not yet written may hold anything.
        start_B: int32, position of the chunk's first token in each sequence.
        length_B: int32, how many of the S tokens are real.
        image_ids_BS: which image a token belongs to, -1 for text; an image lies contiguous in one chunk. None: all text.
        config: None takes what was tuned for this GPU, or the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    tensors = dict(zip(_READS, (q_BSND, k_BSGD, v_BSGD, k_cache_BGWD, v_cache_BGWD), strict=True)) | {
        "start": start_B,
        "length": length_B,
    }
    return WindowPrefill().attend(tensors, image_ids_BS, scale, config)


class WindowPrefill(PrefillKernel):
    """Dims: batch, chunk, start, heads, kv_heads, head_dim, window, images in each sequence.

    ``ragged`` 1: the first sequence is as ``start`` and ``chunk`` say, the others start earlier and are shorter.
    """

    name: ClassVar[str] = "window_prefill"
    source: ClassVar[tuple[str, ...]] = (
        "autotune.kernels.window_prefill",
        "autotune.kernels.prefill_attention",
        "autotune.kernels.prefill_hopper",
    )

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage != "prefill" or not model.local_layers:
            return ()
        dims = {"batch": batch, "chunk": context, "start": 0, "heads": model.heads, "kv_heads": model.kv_heads}
        dims |= {"head_dim": model.head_dim, "window": model.window, "images": 0, "ragged": 0}
        return (Use(name="local attention", case=Case(dtype="bfloat16", dims=dims), count=model.local_layers),)

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        tensors = chunk_tensors(case, slots=case.dims["window"], device=device, seed=seed)
        spoil_unwritten(tensors, tensors["start"])
        return tensors

    def launch(self, config: Config, tensors: Tensors, scale: float) -> Launch:
        window = tensors["k_cache"].shape[2]
        return prefill_launch(_window_prefill_kernel, _READS, config, tensors, window=window, scale=scale)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        return {"out": window_prefill_oracle(inputs, case.dims["head_dim"] ** -0.5)}

    def cost(self, case: Case) -> Cost:
        """Of text: an image's keys ahead of its queries are few."""
        d = case.dims
        window, start, chunk = d["window"], d["start"], d["chunk"]
        growing = min(max(window - start, 0), chunk)  # queries whose window is not yet full
        pairs = growing * start + growing * (growing + 1) // 2 + (chunk - growing) * window
        rows = 2 * chunk * d["heads"] + 2 * (chunk + min(start, window - 1)) * d["kv_heads"]
        return Cost(
            bytes=2 * d["batch"] * rows * d["head_dim"], flops=4 * d["batch"] * d["heads"] * d["head_dim"] * pairs
        )
