"""Tiles of weights and of activations for :mod:`autotune.kernels.matvec`, as a program holds them.

Legend: N rows of weights in a tile, K depth of a tile, P pieces in a row of a tile, V values in a piece, B rows of
activations. Everything here is inlined into the kernel.

A piece is the 16 bytes that a thread loads at once: V = 8 weights of bf16, 16 of int8 (half a block) or 32 of int4 (a
block). With tiles [N, P, V] a thread holds whole pieces, and a sum over V crosses no threads.

Codes become numbers without a conversion: bits below 2**24, read as fp32, are that integer times 2**-149 (subnormals and
the first binade lie evenly). So one AND takes a code out of its word where it stands, 2**e times too large, and the
activations carry the powers of two instead: x 2**(64 - e), once for many rows. What a piece sums up to is then
2**85 times too small, exactly. Fused multiply-adds take subnormals at full speed; flushing them to zero is off in Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _numbers(word_NW, BITS: tl.constexpr):
    """uint32 words to fp32 [N, W, 2, 2(, 2)]: the codes in order, each times 2**(e - 149)."""
    if BITS == 8:
        even = tl.join(word_NW & 0xFF, word_NW & 0xFF0000)
        odd = tl.join(word_NW & 0xFF00, word_NW >> 24)
    else:
        even = tl.join(tl.join(word_NW & 0xF, word_NW & 0xF0000), tl.join(word_NW & 0xF00, (word_NW >> 8) & 0xF0000))
        odd = tl.join(tl.join(word_NW & 0xF0, word_NW & 0xF00000), tl.join(word_NW & 0xF000, word_NW >> 28))
    return tl.join(even, odd).to(tl.float32, bitcast=True)


@triton.jit
def _powers(base: tl.constexpr, BITS: tl.constexpr, V: tl.constexpr):
    """fp32 [V]: 2**(base - e), with e the place of each code in :func:`_numbers`."""
    place_V = tl.arange(0, V) % (32 // BITS)
    if BITS == 8:
        e_V = tl.where(place_V == 3, 0, place_V * 8)
    else:
        e_V = tl.where(place_V == 7, 0, tl.where(place_V == 6, 16, place_V * 4))
    return ((127 + base - e_V) << 23).to(tl.float32, bitcast=True)


@triton.jit
def stored_grid(
    weights, row_N, start, end, DEPTH: tl.constexpr, BITS: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr
):
    """Scale, zero point and minimum of each piece as stored, [N, P], or a constant where the format has one for all.

    The hints on the offsets give a thread one at a time along P, as it holds pieces. Left alone, Triton would vectorise
    these loads, and move what they bring through shared memory. (A hint must stand where the offset is computed.)
    """
    _, scales_ptr, zeros_ptr, minimums_ptr = weights
    BLOCKS: tl.constexpr = DEPTH // 32
    k_P = start + tl.arange(0, P) * (128 // BITS)
    block_P = k_P // 32
    inside_P = (k_P < end)[None, :] if MASK else None
    none = 0.0 if MASK else None
    offset_NP = tl.multiple_of(row_N[:, None] * BLOCKS + block_P[None, :], [1, 1])
    offset_NP = tl.max_contiguous(offset_NP, [1, 2])
    scale_NP = tl.load(scales_ptr + offset_NP, inside_P, other=none)
    zero_NP = 1 << (BITS - 1)
    minimum_NP = 0.0
    if minimums_ptr is not None:
        minimum_NP = tl.load(minimums_ptr + offset_NP, inside_P, other=none)
    if zeros_ptr is not None:
        if BITS == 8:
            zero_NP = tl.load(zeros_ptr + offset_NP, inside_P, other=0 if MASK else None)
        else:
            byte_NP = tl.multiple_of(row_N[:, None] * ((BLOCKS + 1) // 2) + (block_P // 2)[None, :], [1, 1])
            byte_NP = tl.max_contiguous(byte_NP, [1, 2])
            zero_NP = tl.load(zeros_ptr + byte_NP, inside_P, other=0 if MASK else None)
    return scale_NP, zero_NP, minimum_NP


@triton.jit
def stored_tile(
    w_ptr, row_N, start, end,
    DEPTH: tl.constexpr, BITS: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights of bf16 [N, K], or codes as uint32 words."""
    if BITS == 16:
        stored = _weights_as_stored(w_ptr, row_N, start, end, DEPTH, MASK, BLOCK_K)
    else:
        CODES: tl.constexpr = 32 // BITS
        word_W = start // CODES + tl.arange(0, BLOCK_K // CODES)
        stored = tl.load(
            w_ptr.to(tl.pointer_type(tl.uint32)) + row_N[:, None] * (DEPTH // CODES) + word_W[None, :],
            (word_W < end // CODES)[None, :] if MASK else None, other=0 if MASK else None,
            eviction_policy="evict_first",
        )  # fmt: skip
    return stored


@triton.jit
def numbers(stored, grid, start, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile and its grid in fp32: [N, P, V], weights of bf16 as they are, codes as :func:`_numbers` has them; [N, P]."""
    P: tl.constexpr = BLOCK_K * BITS // 128
    scale_NP, zero_NP, minimum_NP = grid
    if BITS == 16:
        w_NPV = tl.reshape(stored, (BLOCK_N, P, 8)).to(tl.float32)
    else:
        w_NPV = tl.reshape(_numbers(stored, BITS), (BLOCK_N, P, 128 // BITS))
        scale_NP = scale_NP.to(tl.float32)
        if zero_NP.dtype == tl.uint8:
            zero_NP = zero_NP.to(tl.int32)
            if BITS == 4:
                block_P = start // 32 + tl.arange(0, P)
                zero_NP = (zero_NP >> (block_P % 2 * 4)[None, :]) & 15
            zero_NP = zero_NP.to(tl.float32)
    return w_NPV, (scale_NP, zero_NP, minimum_NP)


@triton.jit
def _weights_as_stored(
    w_ptr, row_N, start, end, DEPTH: tl.constexpr, MASK: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """bf16 [N, K]; read once, so they leave the caches first."""
    k_K = start + tl.arange(0, BLOCK_K)
    return tl.load(
        w_ptr + row_N[:, None] * DEPTH + k_K[None, :],
        (k_K < end)[None, :] if MASK else None, other=0.0 if MASK else None, eviction_policy="evict_first",
    )  # fmt: skip


@triton.jit
def weight_tile(
    weights, row_N, start, end,
    DEPTH: tl.constexpr, BITS: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """bf16 [N, K] for the matrix units; weights in blocks are rounded to bf16, which is what torch would multiply."""
    if BITS == 16:
        w_NK = _weights_as_stored(weights[0], row_N, start, end, DEPTH, MASK, BLOCK_K)
    else:
        P: tl.constexpr = BLOCK_K * BITS // 128
        V: tl.constexpr = 128 // BITS
        grid = stored_grid(weights, row_N, start, end, DEPTH, BITS, MASK, P)
        stored = stored_tile(weights[0], row_N, start, end, DEPTH, BITS, MASK, BLOCK_N, BLOCK_K)
        code_NPV, grid = numbers(stored, grid, start, BITS, BLOCK_N, BLOCK_K)
        scale_NP, zero_NP, minimum_NP = grid
        # Two steps, as one factor of 2**149 would leave fp32: 2**-23 times the code, then 2**23 times the scale.
        code_NPV = code_NPV * _powers(126, BITS, V)[None, None, :]
        shift_NP = zero_NP * scale_NP + minimum_NP
        w_NPV = code_NPV * (scale_NP * 8388608.0)[:, :, None] - shift_NP[:, :, None]
        w_NK = tl.reshape(w_NPV.to(tl.bfloat16), (BLOCK_N, BLOCK_K))
    return w_NK


@triton.jit
def row_squares(x_ptr, row_B, BATCH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 [B, K], to be summed up: squares of whole rows, for programs that see a part of the depth only."""
    square_BK = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for start in tl.static_range(0, DEPTH, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        inside_BK = (row_B < BATCH)[:, None] & (k_K < DEPTH)[None, :]
        x_BK = tl.load(x_ptr + row_B[:, None] * DEPTH + k_K[None, :], inside_BK, other=0.0).to(tl.float32)
        square_BK += x_BK * x_BK
    return square_BK


@triton.jit
def activations(x_ptr, norm_ptr, row_B, start, end, BATCH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """[B, K], bf16, or with a norm fp32: as stored, and times the norm's scale. Zeros outside."""
    k_K = start + tl.arange(0, BLOCK_K)
    inside_BK = (row_B < BATCH)[:, None] & (k_K < end)[None, :]
    x_BK = tl.load(x_ptr + row_B[:, None] * DEPTH + k_K[None, :], inside_BK, other=0.0)
    scaled_BK = x_BK
    if norm_ptr is not None:
        x_BK = x_BK.to(tl.float32)
        scaled_BK = x_BK * tl.load(norm_ptr + k_K, k_K < end, other=0.0)[None, :]
    return x_BK, scaled_BK


@triton.jit
def _some(ptr, start, end, part: tl.constexpr, P: tl.constexpr, V: tl.constexpr, COUNT: tl.constexpr):
    """[P, COUNT]: the ``part``-th few numbers of every piece, of which each thread loads those of its own pieces."""
    k_PC = start + part * COUNT + tl.arange(0, P)[:, None] * V + tl.arange(0, COUNT)[None, :]
    return tl.load(ptr + k_PC, k_PC < end, other=0.0)


@triton.jit
def activation_pieces(
    x_ptr, norm_ptr, start, end,
    row: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Row ``row`` of the activations as fp32 [P, V], ready for :func:`numbers`; its sums over each piece, and of squares, [P].

    With a norm the activations are times its scale; its factor is for the product, as the squares are known by then.

    A thread loads what its pieces need, sixteen bytes at a time. With a norm, whose scale is as long again in fp32, long
    pieces are loaded as they lie instead, and handed round through shared memory; so are short ones where loads run ahead,
    for the compiler (Triton 3.6) keeps such a scale in local memory then.
    """
    V: tl.constexpr = 128 // BITS
    P: tl.constexpr = BLOCK_K // V
    x_ptr += row * DEPTH
    square_P = 0.0
    if BITS == 16 and (norm_ptr is None or STAGES == 1):
        x_PV = _some(x_ptr, start, end, 0, P, V, 8).to(tl.float32)
        if norm_ptr is not None:
            square_P = tl.sum(x_PV * x_PV, 1)
            scale_P42 = tl.join(_some(norm_ptr, start, end, 0, P, V, 4), _some(norm_ptr, start, end, 1, P, V, 4))
            x_PV *= tl.reshape(tl.permute(scale_P42, (0, 2, 1)), (P, V))
    elif norm_ptr is not None:
        x_1K, scaled_1K = activations(x_ptr, norm_ptr, tl.arange(0, 1), start, end, 1, DEPTH, BLOCK_K)
        square_P = tl.sum(tl.reshape(x_1K * x_1K, (P, V)), 1)
        x_PV = tl.reshape(scaled_1K, (P, V))
    elif BITS == 8:
        x_P82 = tl.join(_some(x_ptr, start, end, 0, P, V, 8), _some(x_ptr, start, end, 1, P, V, 8))
        x_PV = tl.reshape(tl.permute(x_P82, (0, 2, 1)), (P, V)).to(tl.float32)
    else:
        even_P82 = tl.join(_some(x_ptr, start, end, 0, P, V, 8), _some(x_ptr, start, end, 2, P, V, 8))
        odd_P82 = tl.join(_some(x_ptr, start, end, 1, P, V, 8), _some(x_ptr, start, end, 3, P, V, 8))
        x_PV = tl.reshape(tl.permute(tl.join(even_P82, odd_P82), (0, 2, 3, 1)), (P, V)).to(tl.float32)
    total_P = 0.0
    if BITS != 16:
        total_P = tl.sum(x_PV, 1)
        x_PV = x_PV * _powers(64, BITS, V)[None, :]
    return x_PV, total_P, square_P


@triton.jit
def add_pieces(sum_NP, w_NPV, grid, x_PV, total_P, BITS: tl.constexpr):
    """``sum_NP`` plus the products of one row of activations with a tile; zero points cost one product a piece."""
    dot_NP = tl.sum(w_NPV * x_PV[None, :, :], 2)
    if BITS != 16:
        TWO_85: tl.constexpr = 2.0**85
        scale_NP, zero_NP, minimum_NP = grid
        total_NP = total_P[None, :]
        dot_NP = (dot_NP * TWO_85 - zero_NP * total_NP) * scale_NP - minimum_NP * total_NP
    return sum_NP + dot_NP
