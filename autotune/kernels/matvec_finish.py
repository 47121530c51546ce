"""What follows the sums of :mod:`autotune.kernels.matvec`: parts of the depth put together, GeGLU, residual, post-norm.

Legend: B rows of activations, N columns of y in a tile, F all columns of y, S parts of the depth.

``places``: pointers to y [B, F], h [B, F], the post-norm's scale [F], parts [S, 1 or 2, B, F], whole rows [B, F] and
counters [tiles + 1], None where there is no use for one.

Where the depth is split, every program leaves its sums among the parts and counts itself in; the one that counts last for
a tile adds the parts in their order, so that the result does not depend on who came when. The post-norm needs whole rows:
the program that writes the last tile of all makes it. Counters are left at zero.

A count publishes what was stored before it: all threads store, a barrier, one thread counts with release. Who counts last
sets the counter back with acquire, and a barrier puts all threads' loads behind it (PTX ISA, "Memory Consistency Model");
only there does an SM throw away its L1 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from autotune.kernels.matmul_tile import gelu_tanh


@triton.jit
def _write(sum_BN, up_BN, row_B, out_N, places, columns, BATCH: tl.constexpr, GEGLU: tl.constexpr):
    """GeGLU and residual in fp32, and one rounding; among the whole rows, in fp32, where a post-norm follows."""
    y_ptr, h_ptr, _, _, whole_ptr, _ = places
    inside_BN = (row_B < BATCH)[:, None] & (out_N < columns)[None, :]
    offset_BN = row_B[:, None] * columns + out_N[None, :]
    if GEGLU:
        sum_BN = gelu_tanh(sum_BN) * up_BN
    if whole_ptr is not None:
        tl.store(whole_ptr + offset_BN, sum_BN, inside_BN)
    else:
        if h_ptr is not None:
            sum_BN += tl.load(h_ptr + offset_BN, inside_BN, other=0.0).to(tl.float32)
        tl.store(y_ptr + offset_BN, sum_BN.to(y_ptr.dtype.element_ty), inside_BN)


@triton.jit
def _post_norm(places, tiles, columns, eps, BATCH: tl.constexpr, BLOCK_F: tl.constexpr):
    """y = h + rms(sums) post, by whoever writes the last tile; rounded after the norm and after the sum."""
    y_ptr, h_ptr, post_ptr, _, whole_ptr, counters_ptr = places
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + tiles, 1, sem="release") == tiles - 1:
        tl.atomic_xchg(counters_ptr + tiles, 0, sem="acquire")
        tl.debug_barrier()
        for b in tl.range(0, BATCH):
            row_ptr = whole_ptr + b * columns
            square_F = tl.zeros((BLOCK_F,), tl.float32)
            for start in tl.range(0, columns, BLOCK_F):
                out_F = start + tl.arange(0, BLOCK_F)
                sum_F = tl.load(row_ptr + out_F, out_F < columns, other=0.0)
                square_F += sum_F * sum_F
            factor = tl.rsqrt(tl.sum(square_F, 0) / columns + eps)
            for start in tl.range(0, columns, BLOCK_F):
                out_F = start + tl.arange(0, BLOCK_F)
                inside_F = out_F < columns
                sum_F = tl.load(row_ptr + out_F, inside_F, other=0.0)
                post_F = tl.load(post_ptr + out_F, inside_F, other=0.0)
                h_F = tl.load(h_ptr + b * columns + out_F, inside_F, other=0.0).to(tl.float32)
                y_F = h_F + (sum_F * factor * post_F).to(h_ptr.dtype.element_ty).to(tl.float32)
                tl.store(y_ptr + b * columns + out_F, y_F.to(y_ptr.dtype.element_ty), inside_F)


@triton.jit
def _parts_sum(parts_ptr, row_B, out_N, columns, BATCH: tl.constexpr, KINDS: tl.constexpr, SPLIT: tl.constexpr):
    inside_BN = (row_B < BATCH)[:, None] & (out_N < columns)[None, :]
    offset_BN = row_B[:, None] * columns + out_N[None, :]
    sum_BN = tl.load(parts_ptr + offset_BN, inside_BN, other=0.0)
    for part in tl.static_range(1, SPLIT):
        part_ptr = parts_ptr + part * (KINDS * BATCH) * columns
        sum_BN += tl.load(part_ptr + offset_BN, inside_BN, other=0.0)
    return sum_BN


@triton.jit
def finish(
    sums, ups, rows, out_N, tile, tiles, places, columns, eps,
    BATCH: tl.constexpr, GEGLU: tl.constexpr, SPLIT: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Ends tile ``tile`` of ``tiles``.

    ``sums`` and, for GeGLU, ``ups``: tuples of fp32 [B, N], whose rows are ``rows``, a tuple of int32 [B].
    """
    _, _, post_ptr, parts_ptr, _, counters_ptr = places
    if SPLIT == 1:
        for i in tl.static_range(len(sums)):
            _write(sums[i], ups[i], rows[i], out_N, places, columns, BATCH, GEGLU)
        if post_ptr is not None:
            _post_norm(places, tiles, columns, eps, BATCH, BLOCK_F)
    else:
        KINDS: tl.constexpr = 2 if GEGLU else 1
        for i in tl.static_range(len(sums)):
            inside_BN = (rows[i] < BATCH)[:, None] & (out_N < columns)[None, :]
            row_B = tl.program_id(1) * (KINDS * BATCH) + rows[i]
            tl.store(parts_ptr + row_B[:, None] * columns + out_N[None, :], sums[i], inside_BN)
            if GEGLU:
                tl.store(parts_ptr + (row_B + BATCH)[:, None] * columns + out_N[None, :], ups[i], inside_BN)
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + tile, 1, sem="release") == SPLIT - 1:
            tl.atomic_xchg(counters_ptr + tile, 0, sem="acquire")
            tl.debug_barrier()
            for i in tl.static_range(len(sums)):
                sum_BN = _parts_sum(parts_ptr, rows[i], out_N, columns, BATCH, KINDS, SPLIT)
                up_BN = sum_BN
                if GEGLU:
                    up_BN = _parts_sum(parts_ptr + BATCH * columns, rows[i], out_N, columns, BATCH, KINDS, SPLIT)
                _write(sum_BN, up_BN, rows[i], out_N, places, columns, BATCH, GEGLU)
            if post_ptr is not None:
                _post_norm(places, tiles, columns, eps, BATCH, BLOCK_F)
