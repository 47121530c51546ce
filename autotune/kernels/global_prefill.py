"""Prefill of global layers: a chunk's queries over a linear cache that holds the chunk already.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, C slots of the cache.

    out_s = softmax_j(scale * q_s . k_j) v_j    over keys j with position p_j such that
    p_j < max(p_s + 1, end of the image that s belongs to)

The cache holds position p in slot p. A tile takes the blocks that its rows see and no others; the tiles at the chunk's
end, which are the longest, come first. Padding rows are stored as zeros.

Source: Gemma 3 report (arXiv 2503.19786), section 2; FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.kernel import Case, Config, Cost, Stage, Tensors, Use
from autotune.kernels.global_attention import attend
from autotune.kernels.prefill_attention import (
    LOWEST,
    attend_rows,
    ends_of,
    load_queries,
    prefill_launch,
    store_rows,
    tile_of,
    without_padding,
)
from autotune.kernels.prefill_space import PrefillKernel, chunk_tensors, spoil_unwritten
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from runtimes.errors import UsageError

_READS = ("q", "k_cache", "v_cache")


def global_prefill_oracle(inputs: Tensors, scale: float) -> Tensor:
    """The torch oracle: [B, S, N, D], in the dtype of q; zeros in padding rows."""
    t = inputs
    start_B, length_B = t["start"].long(), t["length"].long()
    out_BSND = attend(t["q"], t["k_cache"], t["v_cache"], start_B, length_B, t.get("image_ids"), scale)
    return without_padding(out_BSND, length_B)


@triton.jit
def _global_prefill_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, start_ptr, length_ptr, visible_end_ptr, out_ptr, chunk, slots, scale,
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

    held = start + length
    offset = (batch * KV_HEADS + head // (HEADS // KV_HEADS)).to(tl.int64) * slots * HEAD_DIM
    if TMA:
        rows = tl.maximum(held, 1)
        k = tl.make_tensor_descriptor(k_cache_ptr + offset, [rows, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_N, HEAD_DIM])
        v = tl.make_tensor_descriptor(v_cache_ptr + offset, [rows, HEAD_DIM], [HEAD_DIM, 1], [BLOCK_N, HEAD_DIM])
    else:
        k = k_cache_ptr + offset
        v = v_cache_ptr + offset
    # Every row sees all keys up to the first query; a tile of padding sees none.
    end = tl.where(end > 0, start + end, 0)
    acc_MD, max_M, sum_M = attend_rows(
        q_MD, k, v, HEAD_DIM, held, 0, 0, tl.minimum(start + first + 1, end), end, query_M, start + end_M,
        acc_MD, max_M, sum_M, scale, False, BLOCK_N, HEAD_DIM, TMA, MASK_ALL,
    )  # fmt: skip
    store_rows(out_ptr, acc_MD, sum_M, batch, query_M, head_M, length, chunk, HEADS, HEAD_DIM)


def global_prefill(
    q_BSND: Tensor,
    k_cache_BGCD: Tensor,
    v_cache_BGCD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    *,
    image_ids_BS: Tensor | None = None,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """The attention of a chunk: bf16 [B, S, N, D]; zeros in padding rows.

    Args:
        k_cache_BGCD, v_cache_BGCD: the cache with the chunk in it; slots past its end may hold anything.
        start_B: int32, position of the chunk's first token in each sequence.
        length_B: int32, how many of the S tokens are real.
        image_ids_BS: which image a token belongs to, -1 for text; an image lies contiguous in one chunk. None: all text.
        config: None takes what was tuned for this GPU, or the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    tensors = dict(zip(_READS, (q_BSND, k_cache_BGCD, v_cache_BGCD), strict=True)) | {
        "start": start_B,
        "length": length_B,
    }
    if k_cache_BGCD.shape[2] < q_BSND.shape[1]:
        raise UsageError(f"a chunk of {q_BSND.shape[1]} tokens cannot be in a cache of {k_cache_BGCD.shape[2]} slots")
    return GlobalPrefill().attend(tensors, image_ids_BS, scale, config)


class GlobalPrefill(PrefillKernel):
    """Dims: batch, chunk, start, slots (at least start + chunk), heads, kv_heads, head_dim, images in each sequence.

    ``ragged`` 1: the first sequence is as ``start`` and ``chunk`` say, the others start earlier and are shorter.
    """

    name: ClassVar[str] = "global_prefill"
    source: ClassVar[tuple[str, ...]] = (
        "autotune.kernels.global_prefill",
        "autotune.kernels.prefill_attention",
        "autotune.kernels.prefill_hopper",
    )

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage != "prefill" or not model.global_layers:
            return ()
        dims = {"batch": batch, "chunk": context, "start": 0, "slots": context, "heads": model.heads}
        dims |= {"kv_heads": model.kv_heads, "head_dim": model.head_dim, "images": 0, "ragged": 0}
        return (Use(name="global attention", case=Case(dtype="bfloat16", dims=dims), count=model.global_layers),)

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        tensors = chunk_tensors(case, slots=case.dims["slots"], device=device, seed=seed)
        del tensors["k"], tensors["v"]  # they are in the cache
        spoil_unwritten(tensors, tensors["start"] + tensors["length"])
        return tensors

    def launch(self, config: Config, tensors: Tensors, scale: float) -> Launch:
        return prefill_launch(_global_prefill_kernel, _READS, config, tensors, window=0, scale=scale)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        return {"out": global_prefill_oracle(inputs, case.dims["head_dim"] ** -0.5)}

    def cost(self, case: Case) -> Cost:
        """Of text: an image's keys ahead of its queries are few."""
        d = case.dims
        start, chunk = d["start"], d["chunk"]
        pairs = chunk * start + chunk * (chunk + 1) // 2
        rows = 2 * chunk * d["heads"] + 2 * (chunk + start) * d["kv_heads"]
        return Cost(
            bytes=2 * d["batch"] * rows * d["head_dim"], flops=4 * d["batch"] * d["heads"] * d["head_dim"] * pairs
        )
