"""What both prefill attentions share: the loop over blocks of keys, and how they are launched.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, W window; a tile has M rows:
M / PACK queries of PACK heads that read the same keys; a block has K keys.

    online softmax over blocks:  m' = max(m, max_k s),  l' = l 2**(m - m') + sum_k 2**(s - m'),
                                 o' = o 2**(m - m') + 2**(s - m') v            s = scale log2(e) q . k

Heads of one group lie side by side in a tile: a block of keys is read once for all of them, and a tile covers fewer
positions, so that less of its edge blocks is masked away. Only edge blocks are masked. The running maximum starts at a
finite number, so that a row whose keys are all masked stays at a sum of zero and is stored as zeros.

Rows past a limit are read as zeros, by the bounds of a tensor descriptor or by a mask: whatever a cache holds there,
NaN included, meets neither a score (masked) nor a sum (0 times 0).

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.kernel import Config
from autotune.kernels import prefill_hopper
from autotune.launch import Argument, Constant, Launch
from autotune.tensor_checks import check_tensor
from runtimes.errors import UsageError

LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)
"""Where a running maximum starts: below every score, and finite."""
HEAD_DIMS = (16, 32, 64, 128, 256)


@triton.jit
def tile_of(PACK: tl.constexpr, M: tl.constexpr):
    """First query of this program's tile, its first head, and each row's query and head; long tiles come first."""
    row_M = tl.arange(0, M)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * (M // PACK)
    head = tl.program_id(0) * PACK
    return first, head, first + row_M // PACK, head + row_M % PACK


@triton.jit
def ends_of(visible_end_ptr, batch, query_M, first, length, chunk, IMAGES: tl.constexpr, QUERIES: tl.constexpr):
    """Each row's exclusive end of the chunk's keys it may see, and the largest of the tile's; 0 for a tile of padding."""
    end = tl.minimum(first + QUERIES, length)
    if IMAGES:
        row = batch.to(tl.int64) * chunk
        end_M = tl.load(visible_end_ptr + row + query_M, mask=query_M < length, other=0)
        end = tl.minimum(tl.load(visible_end_ptr + row + end - 1, mask=end > 0, other=0), length)
    else:
        end_M = query_M + 1
    return tl.minimum(end_M, length), tl.where(first < length, end, 0)


@triton.jit
def load_queries(q_ptr, batch, query_M, head_M, chunk, HEADS: tl.constexpr, D: tl.constexpr):
    """[M, D]; zeros past the chunk."""
    row_M = (batch.to(tl.int64) * chunk + query_M) * HEADS + head_M
    return tl.load(q_ptr + row_M[:, None] * D + tl.arange(0, D)[None, :], mask=(query_M < chunk)[:, None], other=0.0)


@triton.jit
def store_rows(
    out_ptr, acc_MD, sum_M, batch, query_M, head_M, length, chunk, HEADS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Divides by the softmax's sum and stores; padding rows are zeros."""
    real_M = (query_M < length) & (sum_M > 0)
    out_MD = tl.where(real_M[:, None], acc_MD / tl.where(real_M, sum_M, 1.0)[:, None], 0.0)
    row_M = (batch.to(tl.int64) * chunk + query_M) * HEADS + head_M
    pointer_MD = out_ptr + row_M[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(pointer_MD, out_MD.to(out_ptr.dtype.element_ty), mask=(query_M < chunk)[:, None])


@triton.jit
def load_rows(rows, stride, first, limit, K: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, GUARD: tl.constexpr):
    """K rows from ``first`` on, [K, D], of a tensor descriptor or of a pointer; zeros from ``limit`` on."""
    if TMA:
        tile_KD = rows.load([first, 0])
    else:
        row_K = first + tl.arange(0, K)
        pointer_KD = rows + row_K.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
        if GUARD:
            tile_KD = tl.load(pointer_KD, mask=(row_K < limit)[:, None], other=0.0)
        else:
            tile_KD = tl.load(pointer_KD)
    return tile_KD


@triton.jit
def attend_block(q_MD, k_KD, v_KD, visible_MK, acc_MD, max_M, sum_M, scale, MASK: tl.constexpr):
    """One step of the online softmax. ``scale`` carries log2(e)."""
    s_MK = tl.dot(q_MD, tl.trans(k_KD))
    if MASK:
        s_MK = tl.where(visible_MK, s_MK, float("-inf"))
    new_M = tl.maximum(max_M, tl.max(s_MK, 1) * scale)
    p_MK = tl.exp2(s_MK * scale - new_M[:, None])
    shrink_M = tl.exp2(max_M - new_M)
    sum_M = sum_M * shrink_M + tl.sum(p_MK, 1)
    acc_MD = tl.dot(p_MK.to(v_KD.dtype), v_KD, acc_MD * shrink_M[:, None])
    return acc_MD, new_M, sum_M


@triton.jit
def attend_rows(
    q_MD, k, v, stride, limit, first, full_begin, full_end, end, low_M, end_M, acc_MD, max_M, sum_M, scale,
    WINDOWED: tl.constexpr, K: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, MASK_ALL: tl.constexpr,
):  # fmt: skip
    """Attends to keys ``first`` to ``end``; row m sees those above ``low_M`` and below ``end_M``.

    ``first`` and ``full_begin`` are multiples of K. All rows see all keys from ``full_begin`` to ``full_end``: whole
    blocks of these take one loop without masks, those before and behind one with masks.
    """
    if MASK_ALL:
        full_begin = first
        full_end = first
    else:
        full_begin = tl.minimum(tl.maximum(full_begin, first), tl.maximum((end + K - 1) // K * K, first))
        full_end = tl.maximum(full_end // K * K, full_begin)
    before = (full_begin - first) // K
    behind = tl.maximum(end - full_end + K - 1, 0) // K
    for step in range(before + behind):
        key = tl.where(step < before, first + step * K, full_end + (step - before) * K)
        key_K = key + tl.arange(0, K)
        visible_MK = key_K[None, :] < end_M[:, None]
        if WINDOWED:
            visible_MK = visible_MK & (key_K[None, :] > low_M[:, None])
        k_KD = load_rows(k, stride, key, limit, K, D, TMA, True)
        v_KD = load_rows(v, stride, key, limit, K, D, TMA, True)
        acc_MD, max_M, sum_M = attend_block(q_MD, k_KD, v_KD, visible_MK, acc_MD, max_M, sum_M, scale, True)
    for key in range(full_begin, full_end, K):
        k_KD = load_rows(k, stride, key, limit, K, D, TMA, False)
        v_KD = load_rows(v, stride, key, limit, K, D, TMA, False)
        acc_MD, max_M, sum_M = attend_block(q_MD, k_KD, v_KD, None, acc_MD, max_M, sum_M, scale, False)
    return acc_MD, max_M, sum_M


def visible_ends_BS(image_ids_BS: Tensor) -> Tensor:
    """For each query the end, exclusive and counted in the chunk, of the keys it may see: int32 [B, S].

    One past its own for text; the end of its image for an image's token, whose image lies contiguous in the chunk.

    Args:
        image_ids_BS: which image a token belongs to, -1 for text.
    """
    chunk = image_ids_BS.shape[1]
    last_BS = torch.ones_like(image_ids_BS, dtype=torch.bool)
    last_BS[:, :-1] = (image_ids_BS[:, 1:] != image_ids_BS[:, :-1]) | (image_ids_BS[:, :-1] < 0)
    end_S = torch.arange(1, chunk + 1, device=image_ids_BS.device)
    own_BS = torch.where(last_BS, end_S, chunk)
    return own_BS.flip(1).cummin(1).values.flip(1).to(torch.int32)


def check_prefill(tensors: Mapping[str, Tensor]) -> None:
    """All that a prefill reads and writes, by name.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    q = tensors["q"]
    if q.dim() != 4:
        raise UsageError(f"q must be [batch, chunk, heads, head_dim], but has the shape {tuple(q.shape)}")
    batch, chunk, heads, head_dim = q.shape
    kv_heads, slots = tensors["k_cache"].shape[1:3]
    if head_dim not in HEAD_DIMS:
        raise UsageError(f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, but is {head_dim}")
    if heads % kv_heads:
        raise UsageError(f"the query heads must share the key-value heads evenly, but there are {heads} and {kv_heads}")
    shapes = {"q": q.shape, "out": q.shape, "start": (batch,), "length": (batch,), "visible_end": (batch, chunk)}
    shapes |= dict.fromkeys(("k", "v"), (batch, chunk, kv_heads, head_dim))
    shapes |= dict.fromkeys(("k_cache", "v_cache"), (batch, kv_heads, slots, head_dim))
    for name, tensor in tensors.items():
        dtype = torch.int32 if name in ("start", "length", "visible_end") else torch.bfloat16
        check_tensor(name, tensor, shape=shapes[name], dtypes=(dtype,), device=q.device)


def without_padding(out_BSND: Tensor, length_B: Tensor) -> Tensor:
    """Zeros in the rows past each sequence's length, as the kernels store them."""
    step_S = torch.arange(out_BSND.shape[1], device=out_BSND.device)
    return out_BSND.masked_fill((step_S[None, :] >= length_B[:, None])[:, :, None, None], 0)


def prefill_launch(
    function: object,
    reads: tuple[str, ...],
    config: Config,
    tensors: Mapping[str, Tensor],
    *,
    window: int,
    scale: float,
) -> Launch:
    """The launch of ``function``, or of the kernel for Hopper. ``window`` 0: a linear cache."""
    batch, chunk, heads, head_dim = tensors["q"].shape
    kv_heads, slots = tensors["k_cache"].shape[1:3]
    c = config.constants
    names = (*reads, "start", "length", "visible_end", "out")
    if c["HOPPER"]:
        names = ("q", "k", "v", "k_cache", "v_cache", *names[-4:])
    constants: dict[str, Constant] = {f"{name}_ptr": None for name in names if name not in tensors}
    arguments: dict[str, Argument] = {f"{name}_ptr": tensors[name] for name in names if name in tensors}
    arguments |= {"chunk": chunk, "slots": slots, "scale": scale * LOG2_E}
    constants |= {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "WINDOW": window}
    constants |= {"IMAGES": "visible_end" in tensors, "BLOCK_N": c["BLOCK_N"]}
    if c["HOPPER"]:
        tiles = triton.cdiv(chunk, prefill_hopper.QUERIES) * heads // 2
        return Launch(
            function=prefill_hopper.prefill_hopper_kernel,
            grid=(min(tiles, c["PROGRAMS"] or tiles), batch, 1),
            arguments=arguments,
            constants=constants | {"STAGES": config.num_stages},
            num_warps=4,  # of one consumer: Gluon adds the others
            num_stages=config.num_stages,
            max_registers=prefill_hopper.REGISTERS,
        )
    return Launch(
        function=function,
        grid=(heads // c["PACK"], batch, triton.cdiv(chunk, c["BLOCK_M"] // c["PACK"])),
        arguments=arguments,
        constants=constants | {name: c[name] for name in ("BLOCK_M", "PACK", "TMA", "MASK_ALL")},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
