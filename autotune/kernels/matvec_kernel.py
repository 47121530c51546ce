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

from autotune.kernels.dependent import release, wait
from autotune.kernels.matvec_finish import finish
from autotune.kernels.matvec_weights import (
    activation_pieces,
    activations,
    add_pieces,
    numbers,
    row_squares,
    stored_grid,
    stored_tile,
    weight_tile,
)


@triton.jit
def _ready(
    x_ptr, norm_ptr, squares, start, end,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tuples over the batch: activations [P, V], their sums over each piece, and ``squares``, [P] or 0, with more of them."""
    xs = ()
    totals = ()
    new = ()
    for b in tl.static_range(BATCH):
        x_PV, total_P, square_P = activation_pieces(x_ptr, norm_ptr, start, end, b, DEPTH, BITS, BLOCK_K, STAGES)
        xs = xs + (x_PV,)
        totals = totals + (total_P,)
        new = new + (squares[b] + square_P,)
    return xs, totals, new


@triton.jit
def _no_squares(norm_ptr, BATCH: tl.constexpr, P: tl.constexpr):
    squares = ()
    for _ in tl.static_range(BATCH):
        if norm_ptr is None:
            squares = squares + (0.0,)
        else:
            squares = squares + (tl.zeros((P,), tl.float32),)
    return squares


@triton.jit
def _factors(
    x_ptr, norm_ptr, squares, eps, BATCH: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A tuple over the batch: 1 / sqrt(mean(x**2) + eps), from sums of squares [P] where the program saw the whole depth."""
    factors = ()
    for b in tl.static_range(BATCH):
        if norm_ptr is None:
            factors = factors + (1.0,)
        elif SPLIT == 1:
            factors = factors + (tl.rsqrt(tl.sum(squares[b], 0) / DEPTH + eps),)
        else:
            square_1K = row_squares(x_ptr, b + tl.arange(0, 1), BATCH, DEPTH, 1, BLOCK_K)
            factors = factors + (tl.rsqrt(tl.sum(tl.sum(square_1K, 1), 0) / DEPTH + eps),)
    return factors


@triton.jit
def _load_tile(
    weights, row_N, start, end,
    DEPTH: tl.constexpr, BITS: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile and its grid as stored."""
    grid = (0.0, 0.0, 0.0)
    if BITS != 16:
        grid = stored_grid(weights, row_N, start, end, DEPTH, BITS, MASK, BLOCK_K * BITS // 128)
    return stored_tile(weights[0], row_N, start, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K), grid


@triton.jit
def _add_tile(
    sums, xs, totals, stored, start, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """``sums``, a tuple over the batch of [N, P], plus a tile's products."""
    w_NPV, grid = numbers(stored[0], stored[1], start, BITS, BLOCK_N, BLOCK_K)
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
def _over_pieces(sums, factors, norm_ptr):
    """A tuple over the batch of [1, N], with the norm's factors."""
    totals = ()
    for b in tl.static_range(len(sums)):
        total_N = tl.sum(sums[b], 1)
        if norm_ptr is not None:
            total_N *= factors[b]
        totals = totals + (total_N[None, :],)
    return totals


@triton.jit
def _numbered(BATCH: tl.constexpr):
    """A tuple over the batch: the row's number, [1]."""
    rows = ()
    for b in tl.static_range(BATCH):
        rows = rows + (b + tl.arange(0, 1),)
    return rows


@triton.jit
def _load_kinds(
    weights, tile, start, end, columns,
    DEPTH: tl.constexpr, BITS: tl.constexpr, GEGLU: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What tile ``tile`` of y takes: its part of W, and for GeGLU that of the up rows, else the same again."""
    row_N = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
    gate = _load_tile(weights, row_N, start, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
    up = gate
    if GEGLU:
        up = _load_tile(weights, row_N + columns, start, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
    return gate, up


@triton.jit
def _one_depth(
    x_ptr, norm_ptr, weights, places, start, end, columns, eps,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, GEGLU: tl.constexpr, SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr, LOOP: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """By multiply-adds, where a tile is as deep as the program's part: the activations stay in registers.

    The next tile is loaded before the last one is multiplied.
    """
    first = tl.program_id(0) * LOOP
    gate, up = _load_kinds(weights, first, start, end, columns, DEPTH, BITS, GEGLU, MASK, BLOCK_N, BLOCK_K)
    wait(DEPENDENT)
    squares = _no_squares(norm_ptr, BATCH, BLOCK_K * BITS // 128)
    xs, totals, squares = _ready(x_ptr, norm_ptr, squares, start, end, BATCH, DEPTH, BITS, BLOCK_K, 1)
    factors = _factors(x_ptr, norm_ptr, squares, eps, BATCH, DEPTH, SPLIT, BLOCK_K)
    rows = _numbered(BATCH)
    zeros = _zeros(BATCH, BLOCK_N, BLOCK_K * BITS // 128)
    for i in tl.static_range(LOOP):
        next_gate, next_up = gate, up
        if i + 1 < LOOP:
            next_gate, next_up = _load_kinds(
                weights, first + i + 1, start, end, columns, DEPTH, BITS, GEGLU, MASK, BLOCK_N, BLOCK_K
            )
        sums = _add_tile(zeros, xs, totals, gate, start, BITS, BLOCK_N, BLOCK_K)
        ups = sums
        if GEGLU:
            ups = _add_tile(zeros, xs, totals, up, start, BITS, BLOCK_N, BLOCK_K)
        gate, up = next_gate, next_up
        out_N = (first + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        finish(
            _over_pieces(sums, factors, norm_ptr), _over_pieces(ups, factors, norm_ptr), rows, out_N, first + i,
            tl.num_programs(0) * LOOP, places, columns, eps, BATCH, GEGLU, SPLIT, BLOCK_F,
        )  # fmt: skip


@triton.jit
def _by_steps(
    x_ptr, norm_ptr, weights, places, start, end, columns, eps,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, GEGLU: tl.constexpr, SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """By multiply-adds, along the depth. In one stage, the first step's weights are loaded before the wait."""
    tile = tl.program_id(0)
    out_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_N = tl.minimum(out_N, columns - 1).to(tl.int64)
    PEEL: tl.constexpr = DEPENDENT and STAGES == 1
    if PEEL:
        stored = _load_tile(weights, row_N, start, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
        up = stored
        if GEGLU:
            up = _load_tile(weights, row_N + columns, start, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
    wait(DEPENDENT)
    squares = _no_squares(norm_ptr, BATCH, BLOCK_K * BITS // 128)
    sums = _zeros(BATCH, BLOCK_N, BLOCK_K * BITS // 128)
    ups = sums
    if PEEL:
        xs, totals, squares = _ready(x_ptr, norm_ptr, squares, start, end, BATCH, DEPTH, BITS, BLOCK_K, STAGES)
        sums = _add_tile(sums, xs, totals, stored, start, BITS, BLOCK_N, BLOCK_K)
        if GEGLU:
            ups = _add_tile(ups, xs, totals, up, start, BITS, BLOCK_N, BLOCK_K)
        start += BLOCK_K
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        xs, totals, squares = _ready(x_ptr, norm_ptr, squares, k, end, BATCH, DEPTH, BITS, BLOCK_K, STAGES)
        stored = _load_tile(weights, row_N, k, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
        sums = _add_tile(sums, xs, totals, stored, k, BITS, BLOCK_N, BLOCK_K)
        if GEGLU:
            stored = _load_tile(weights, row_N + columns, k, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
            ups = _add_tile(ups, xs, totals, stored, k, BITS, BLOCK_N, BLOCK_K)
    factors = _factors(x_ptr, norm_ptr, squares, eps, BATCH, DEPTH, SPLIT, BLOCK_K)
    rows = _numbered(BATCH)
    finish(
        _over_pieces(sums, factors, norm_ptr), _over_pieces(ups, factors, norm_ptr), rows, out_N, tile, tl.num_programs(0), places, columns, eps,
        BATCH, GEGLU, SPLIT, BLOCK_F,
    )  # fmt: skip


@triton.jit
def _by_matrix_units(
    x_ptr, norm_ptr, weights, places, start, end, columns, eps,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, GEGLU: tl.constexpr, SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The batch is filled up to 8 or 16 rows."""
    BLOCK_B: tl.constexpr = 16 if BATCH > 8 else 8
    row_B = tl.arange(0, BLOCK_B)
    wait(DEPENDENT)
    tile = tl.program_id(0)
    out_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_N = tl.minimum(out_N, columns - 1).to(tl.int64)
    sum_NB = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    up_NB = sum_NB
    square_BK = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        x_BK, scaled_BK = activations(x_ptr, norm_ptr, row_B, k, end, BATCH, DEPTH, BLOCK_K)
        if norm_ptr is not None and SPLIT == 1:
            square_BK += x_BK * x_BK
        x_KB = scaled_BK.to(tl.bfloat16).T
        w_NK = weight_tile(weights, row_N, k, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
        sum_NB = tl.dot(w_NK, x_KB, sum_NB)
        if GEGLU:
            w_NK = weight_tile(weights, row_N + columns, k, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
            up_NB = tl.dot(w_NK, x_KB, up_NB)
    if norm_ptr is not None:
        if SPLIT > 1:
            square_BK = row_squares(x_ptr, row_B, BATCH, DEPTH, BLOCK_B, BLOCK_K)
        factor_B = tl.rsqrt(tl.sum(square_BK, 1) / DEPTH + eps)
        sum_NB *= factor_B[None, :]
        up_NB *= factor_B[None, :]
    finish(
        (sum_NB.T,), (up_NB.T,), (row_B,), out_N, tile, tl.num_programs(0), places, columns, eps,
        BATCH, GEGLU, SPLIT, BLOCK_F,
    )  # fmt: skip


@triton.jit
def matvec_kernel(
    x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, minimums_ptr, y_ptr, h_ptr, post_ptr, parts_ptr, whole_ptr, counters_ptr,
    columns, eps,
    BATCH: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, GEGLU: tl.constexpr, DOT: tl.constexpr,
    SPLIT: tl.constexpr, CHUNK: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Tiles of columns along x, parts of the depth along y. ``CHUNK``: the depth of a part, a multiple of 64 or all."""
    release(DEPENDENT)
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
            BATCH, DEPTH, BITS, GEGLU, SPLIT, DEPENDENT, STAGES, MASK, BLOCK_N, BLOCK_K, BLOCK_F,
        )  # fmt: skip
    elif CHUNK <= BLOCK_K:
        _one_depth(
            x_ptr, norm_ptr, weights, places, start, end, columns, eps,
            BATCH, DEPTH, BITS, GEGLU, SPLIT, DEPENDENT, LOOP, MASK, BLOCK_N, BLOCK_K, BLOCK_F,
        )  # fmt: skip
    else:
        _by_steps(
            x_ptr, norm_ptr, weights, places, start, end, columns, eps,
            BATCH, DEPTH, BITS, GEGLU, SPLIT, DEPENDENT, STAGES, MASK, BLOCK_N, BLOCK_K, BLOCK_F,
        )  # fmt: skip
