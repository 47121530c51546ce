"""The Triton function of :mod:`autotune.kernels.matvec`: sums of products, by multiply-adds or by the matrix units.

Legend: B rows of activations, N rows of weights in a tile, K depth of a tile, P pieces, V values in a piece (see
:mod:`autotune.kernels.matvec_weights`). ``weights``: pointers to weights or codes, scales, zeros and minimums; ``places``:
pointers to y, h, the post-norm's scale, parts, whole rows and counters (see :mod:`autotune.kernels.matvec_finish`).

Multiply-adds (``DOT`` false): every row of activations is held in fp32 and meets each weight once, for up to 8 rows. Where
one tile is as deep as W, a program works through ``LOOP`` tiles, so that activations, with their norm, are made ready
once for all of them. Matrix units (``DOT``): the weights are the left operand, and up to 16 rows cost the same.
"""

# Triton's tuples grow by `+` alone, and mypy takes `()` for a tuple that stays empty.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from autotune.kernels.matvec_finish import finish
from autotune.kernels.matvec_weights import (
    activation_pieces,
    activations,
    add_pieces,
    norm_factors,
    piece_grid,
    piece_values,
    weight_tile,
)


@triton.jit
def _factors(x_ptr, norm_ptr, eps, BATCH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tuple over the batch: the row's number [1], and its norm's factor [1], 0 where there is no norm."""
    rows = ()
    factors = ()
    for b in tl.static_range(BATCH):
        row_1 = b + tl.arange(0, 1)
        rows = rows + (row_1,)
        if norm_ptr is not None:
            factors = factors + (norm_factors(x_ptr, row_1, eps, BATCH, DEPTH, 1, BLOCK_K),)
        else:
            factors = factors + (0.0,)
    return rows, factors


@triton.jit
def _ready(
    x_ptr, norm_ptr, factors, start, end,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tuples over the batch: activations [P, V], and their sums over each piece."""
    xs = ()
    totals = ()
    for b in tl.static_range(BATCH):
        x_PV, total_P = activation_pieces(x_ptr, norm_ptr, factors[b], start, end, b, DEPTH, BITS, BLOCK_K, STAGES)
        xs = xs + (x_PV,)
        totals = totals + (total_P,)
    return xs, totals


@triton.jit
def _add_tile(
    sums, xs, totals, weights, row_N, start, end,
    DEPTH: tl.constexpr, BITS: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``sums``, a tuple over the batch of [N, P], plus a tile's products."""
    grid = (0.0, 0.0, 0.0)
    if BITS != 16:
        grid = piece_grid(weights, row_N, start, end, DEPTH, BITS, MASK, BLOCK_K * BITS // 128)
    w_NPV = piece_values(weights[0], row_N, start, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
    new = ()
    for b in tl.static_range(len(sums)):
        new = new + (add_pieces(sums[b], w_NPV, grid, xs[b], totals[b], BITS),)
    return new


@triton.jit
def _zeros(BATCH: tl.constexpr, BLOCK_N: tl.constexpr, P: tl.constexpr):
    sums = ()
    for _ in tl.static_range(BATCH):
        sums = sums + (tl.zeros((BLOCK_N, P), tl.float32),)
    return sums


@triton.jit
def _over_pieces(sums):
    totals = ()
    for b in tl.static_range(len(sums)):
        totals = totals + (tl.sum(sums[b], 1)[None, :],)
    return totals


@triton.jit
def _one_depth(
    x_ptr, norm_ptr, weights, places, start, end, columns, eps,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, GEGLU: tl.constexpr, SPLIT: tl.constexpr,
    LOOP: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """By multiply-adds, where a tile is as deep as the program's part: the activations stay in registers."""
    rows, factors = _factors(x_ptr, norm_ptr, eps, BATCH, DEPTH, BLOCK_K)
    xs, totals = _ready(x_ptr, norm_ptr, factors, start, end, BATCH, DEPTH, BITS, BLOCK_K, 1)
    for i in tl.range(0, LOOP, num_stages=STAGES):
        tile = tl.program_id(0) * LOOP + i
        out_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_N = tl.minimum(out_N, columns - 1).to(tl.int64)
        zeros = _zeros(BATCH, BLOCK_N, BLOCK_K * BITS // 128)
        sums = _add_tile(zeros, xs, totals, weights, row_N, start, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
        ups = sums
        if GEGLU:
            ups = _add_tile(
                zeros, xs, totals, weights, row_N + columns, start, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K
            )  # fmt: skip
        finish(
            _over_pieces(sums), _over_pieces(ups), rows, out_N, tile, tl.num_programs(0) * LOOP, places, columns, eps,
            BATCH, GEGLU, SPLIT, BLOCK_F,
        )  # fmt: skip


@triton.jit
def _by_steps(
    x_ptr, norm_ptr, weights, places, start, end, columns, eps,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, GEGLU: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """By multiply-adds, along the depth."""
    rows, factors = _factors(x_ptr, norm_ptr, eps, BATCH, DEPTH, BLOCK_K)
    tile = tl.program_id(0)
    out_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_N = tl.minimum(out_N, columns - 1).to(tl.int64)
    sums = _zeros(BATCH, BLOCK_N, BLOCK_K * BITS // 128)
    ups = sums
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        xs, totals = _ready(x_ptr, norm_ptr, factors, k, end, BATCH, DEPTH, BITS, BLOCK_K, STAGES)
        sums = _add_tile(sums, xs, totals, weights, row_N, k, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
        if GEGLU:
            ups = _add_tile(ups, xs, totals, weights, row_N + columns, k, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
    finish(
        _over_pieces(sums), _over_pieces(ups), rows, out_N, tile, tl.num_programs(0), places, columns, eps,
        BATCH, GEGLU, SPLIT, BLOCK_F,
    )  # fmt: skip


@triton.jit
def _by_matrix_units(
    x_ptr, norm_ptr, weights, places, start, end, columns, eps,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, GEGLU: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The batch is filled up to 8 or 16 rows."""
    BLOCK_B: tl.constexpr = 16 if BATCH > 8 else 8
    row_B = tl.arange(0, BLOCK_B)
    factor_B = 0.0
    if norm_ptr is not None:
        factor_B = norm_factors(x_ptr, row_B, eps, BATCH, DEPTH, BLOCK_B, BLOCK_K)
    tile = tl.program_id(0)
    out_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_N = tl.minimum(out_N, columns - 1).to(tl.int64)
    sum_NB = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    up_NB = sum_NB
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        x_KB = activations(x_ptr, norm_ptr, factor_B, row_B, k, end, BATCH, DEPTH, BLOCK_K).T
        w_NK = weight_tile(weights, row_N, k, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
        sum_NB = tl.dot(w_NK, x_KB, sum_NB)
        if GEGLU:
            w_NK = weight_tile(weights, row_N + columns, k, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
            up_NB = tl.dot(w_NK, x_KB, up_NB)
    finish(
        (sum_NB.T,), (up_NB.T,), (row_B,), out_N, tile, tl.num_programs(0), places, columns, eps,
        BATCH, GEGLU, SPLIT, BLOCK_F,
    )  # fmt: skip


@triton.jit
def matvec_kernel(
    x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, minimums_ptr, y_ptr, h_ptr, post_ptr, parts_ptr, whole_ptr, counters_ptr,
    columns, eps,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, GEGLU: tl.constexpr, DOT: tl.constexpr,
    SPLIT: tl.constexpr, CHUNK: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Tiles of columns along x, parts of the depth along y. ``CHUNK``: the depth of a part, a multiple of 64 or all."""
    MASK: tl.constexpr = DEPTH % CHUNK != 0 or CHUNK % BLOCK_K != 0
    weights = (w_ptr, scales_ptr, zeros_ptr, minimums_ptr)
    places = (y_ptr, h_ptr, post_ptr, parts_ptr, whole_ptr, counters_ptr)
    if SPLIT == 1:
        start = 0
        end = DEPTH
    else:
        start = tl.program_id(1) * CHUNK
        end = start + CHUNK if DEPTH % CHUNK == 0 else tl.minimum(start + CHUNK, DEPTH)
    if DOT:
        _by_matrix_units(
            x_ptr, norm_ptr, weights, places, start, end, columns, eps,
            BATCH, DEPTH, BITS, GEGLU, SPLIT, STAGES, MASK, BLOCK_N, BLOCK_K, BLOCK_F,
        )  # fmt: skip
    elif CHUNK <= BLOCK_K:
        _one_depth(
            x_ptr, norm_ptr, weights, places, start, end, columns, eps,
            BATCH, DEPTH, BITS, GEGLU, SPLIT, LOOP, STAGES, MASK, BLOCK_N, BLOCK_K, BLOCK_F,
        )  # fmt: skip
    else:
        _by_steps(
            x_ptr, norm_ptr, weights, places, start, end, columns, eps,
            BATCH, DEPTH, BITS, GEGLU, SPLIT, STAGES, MASK, BLOCK_N, BLOCK_K, BLOCK_F,
        )  # fmt: skip
