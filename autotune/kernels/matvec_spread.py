"""The Gluon function of :mod:`autotune.kernels.matvec` for weights in blocks: codes meet the matrix units as they are.

Legend: S warps, each with a part of the depth; R = 16 rows of weights in a tile; a piece is the 16 bytes of a row that a
thread loads: 32 codes of 4 bits, a block, or 16 of 8 bits, half a block. T = 4 pieces side by side in a step of a warp, C = 8
columns of a product: T pieces for each of 2 rows of activations. K = 128 half-bytes, the depth of a step.

A product of matrix units adds up over the depth, but every block of 32 has a scale of its own. So the other operand is
spread out: column (b, t) holds row b of the activations at piece t and zeros elsewhere, and the product has a column for
every piece. Scales and zero points then meet the sums of pieces, not weights: with X, the sum of x over a block, as
the same product has it for a row of ones,

    y = sum over blocks of scale (sum(code x) - zero X)

A half-byte n becomes bf16 128 + n by two bits of logic for two of them at once (its bits are the low mantissa bits of 128.0),
and 128 X is taken off with the zero point. A code of 8 bits is two half-bytes, the upper one worth 16: its activations
stand there twice, once times 16.

The order of the depth within a step is free as long as both operands share it: that of the matrix units' registers, in
which thread t of a group of 4 holds piece t as it was loaded. No weight crosses from thread to thread.

Source: PTX ISA, fragments of mma.m16n8k16.
"""

# Triton's tuples grow by `+` alone, and mypy takes `()` for a tuple that stays empty.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from autotune.kernels.dependent import release, wait
from autotune.kernels.matvec_pieces import bases, gelu_tanh, partial


@gluon.constexpr_function
def _mma_layout(S):
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[S, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def _code_layout(S):
    """[S, R, T, 8 half-words]."""
    return gl.DistributedLinearLayout(
        reg_bases=bases(8, 0, 0, 0, 1) + [[0, 8, 0, 0]],
        lane_bases=bases(4, 0, 0, 1, 0) + bases(8, 0, 1, 0, 0),
        warp_bases=bases(S, 1, 0, 0, 0),
        block_bases=[],
        shape=[S, 16, 4, 8],
    )


@gluon.constexpr_function
def _stored_layout(G, NB, S, V):
    """[G, NB, S, T, 4, V / 4]: activations as they are loaded, 8 half-bytes of each step a thread."""
    return gl.DistributedLinearLayout(
        reg_bases=bases(V // 4, 0, 0, 0, 0, 0, 1) + bases(G, 1, 0, 0, 0, 0, 0),
        lane_bases=bases(4, 0, 0, 0, 0, 1, 0) + bases(4, 0, 0, 0, 1, 0, 0) + [[0, NB - 1, 0, 0, 0, 0]],
        warp_bases=bases(S, 0, 0, 1, 0, 0, 0),
        block_bases=[],
        shape=[G, NB, S, 4, 4, V // 4],
    )


@gluon.constexpr_function
def _group(steps):
    """Steps of activations that are staged at once: a power of two, up to 8."""
    found = 1
    while found < steps and found < 8:
        found *= 2
    return found


@gluon.constexpr_function
def _spread_layout(S):
    """[S, T, 32, 2, 4]: half-bytes of a piece for each column."""
    return gl.DistributedLinearLayout(
        reg_bases=bases(32, 0, 0, 1, 0, 0),
        lane_bases=bases(4, 0, 1, 0, 0, 0) + bases(4, 0, 0, 0, 0, 1) + [[0, 0, 0, 1, 0]],
        warp_bases=bases(S, 1, 0, 0, 0, 0),
        block_bases=[],
        shape=[S, 4, 32, 2, 4],
    )


@gluon.constexpr_function
def _zero_layout(S):
    """[S, R, C / 2, 2]."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [0, 8, 0, 0]],
        lane_bases=bases(4, 0, 0, 1, 0) + bases(8, 0, 1, 0, 0),
        warp_bases=bases(S, 1, 0, 0, 0),
        block_bases=[],
        shape=[S, 16, 4, 2],
    )


@gluon.jit
def _half_bytes(half_SRTH):
    """Four bf16 tensors: 128 + each half-byte of uint16 half-words, the lowest first; two half-words at a time."""
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b32 a, b, c;
            shr.u32 a, $4, 4;
            shr.u32 b, $4, 8;
            shr.u32 c, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, a, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, b, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, c, 0x000F000F, 0x43004300, 0xEA;
        }
        """,
        "=r,=r,=r,=r,r",
        [half_SRTH],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _weights(half_SRTH, S: gl.constexpr):
    """bf16 [S, R, K], the left operand: bits of the place in K are, from above, half-word 4, T, half-word 2, half-byte, half-word 1."""
    q0, q1, q2, q3 = _half_bytes(half_SRTH)
    q = gl.join(gl.join(q0, q2), gl.join(q1, q3))  # [S, R, T, 8, 2, 2], half-bytes in order
    q = gl.reshape(q, [S, 16, 4, 2, 2, 2, 2, 2])
    q = gl.reshape(gl.permute(q, [0, 1, 3, 2, 4, 6, 7, 5]), [S, 16, 128])
    return gl.convert_layout(q, gl.DotOperandLayout(0, _mma_layout(S), 16), assert_trivial=True)


@gluon.jit
def _load_zeros(zeros_ptr, row, columns, step, BLOCKS: gl.constexpr, MASK: gl.constexpr, S: gl.constexpr):
    """uint8 [S, R, C / 2]: zero points of 4 bits, two in a byte."""
    ZEROS: gl.constexpr = gl.SliceLayout(3, _zero_layout(S))
    row_R = gl.minimum(row + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, ZEROS))), columns - 1)
    row_R = row_R.to(gl.int64)[None, :, None]
    s_S = gl.arange(0, S, gl.SliceLayout(1, gl.SliceLayout(2, ZEROS)))[:, None, None]
    pair = (step * S + s_S) * 2 + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, ZEROS)))[None, None, :] % 2
    byte_ptr = zeros_ptr + (row_R * ((BLOCKS + 1) // 2) + pair)
    if MASK:
        byte = gl.load(byte_ptr, (pair < (BLOCKS + 1) // 2) & (row_R >= 0), other=0)
    else:
        byte = gl.load(byte_ptr)
    return byte


@gluon.jit
def _load_tile(
    weights, row, columns, step,
    DEPTH: gl.constexpr, BITS: gl.constexpr, MASK: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """A step of one tile as stored: half-words [S, R, T, 8], scales, zeros (or nothing) and minimums [S, R, C]."""
    codes_ptr, scales_ptr, zeros_ptr, minimums_ptr = weights
    PIECES: gl.constexpr = DEPTH * BITS // 128
    BLOCKS: gl.constexpr = DEPTH // 32
    CODES: gl.constexpr = _code_layout(S)
    R: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, CODES)))
    STEP: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, CODES)))
    T: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, CODES)))
    H: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, CODES)))
    row_R = gl.minimum(row + gl.arange(0, 16, R), columns - 1).to(gl.int64)[None, :, None, None]
    s_S = gl.arange(0, S, STEP)[:, None, None, None]
    piece = (step * S + s_S) * 4 + gl.arange(0, 4, T)[None, None, :, None]
    half = row_R * (PIECES * 8) + (piece * 8 + gl.arange(0, 8, H)[None, None, None, :])
    half_ptr = codes_ptr.to(gl.pointer_type(gl.uint16), bitcast=True) + half
    if MASK:
        # What is left undefined is finite, whatever its bits are, and meets zeros.
        half_SRTH = gl.load(half_ptr, (piece < PIECES) & (row_R >= 0), eviction_policy="evict_first")
    else:
        half_SRTH = gl.load(half_ptr, eviction_policy="evict_first")

    SUMS: gl.constexpr = _mma_layout(S)
    row_R = gl.minimum(row + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, SUMS))), columns - 1)
    row_R = row_R.to(gl.int64)[None, :, None]
    s_S = gl.arange(0, S, gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))[:, None, None]
    t_C = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, SUMS)))[None, None, :] % 4
    if BITS == 8:
        block = ((step * S + s_S) * 4 + t_C) // 2
    else:
        block = (step * S + s_S) * 4 + t_C
    inside = (block < BLOCKS) & (row_R >= 0)
    offset = row_R * BLOCKS + block
    minimum_SRC = 0.0
    zero_SRC = 0.0
    if MASK:
        scale_SRC = gl.load(scales_ptr + offset, inside, other=0.0)
        if minimums_ptr is not None:
            minimum_SRC = gl.load(minimums_ptr + offset, inside, other=0.0)
    else:
        scale_SRC = gl.load(scales_ptr + offset)
        if minimums_ptr is not None:
            minimum_SRC = gl.load(minimums_ptr + offset)
    if zeros_ptr is not None:
        if BITS == 8:
            zero_SRC = gl.load(zeros_ptr + offset, inside, other=0)
        else:
            zero_SRC = _load_zeros(zeros_ptr, row, columns, step, BLOCKS, MASK, S)
    return half_SRTH, scale_SRC, zero_SRC, minimum_SRC


@gluon.jit
def _base(stored, BITS: gl.constexpr, S: gl.constexpr):
    """fp32 [S, R, C]: what to take off for each of the totals, from the zero points that :func:`_load_tile` loaded."""
    if BITS == 8:
        base_SRC = 128.0 + stored.to(gl.float32) * (1.0 / 17.0)
    else:
        shift = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, _zero_layout(S)))))
        byte = gl.expand_dims(stored.to(gl.int32), 3)
        # 2 ** 23 with the code in its lowest bits is 2 ** 23 + code.
        code = ((byte >> (shift * 4)[None, None, None, :]) & 15) | 0x4B000000
        number = code.to(gl.float32, bitcast=True) - (8388608.0 - 128.0)
        base_SRC = gl.convert_layout(gl.reshape(number, [S, 16, 8]), _mma_layout(S), assert_trivial=True)
    return base_SRC


@gluon.jit
def _stage(
    x_ptr, norm_ptr, x_steps, total_steps, pair: gl.constexpr,
    BATCH: gl.constexpr, DEPTH: gl.constexpr, BITS: gl.constexpr, STEPS: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Leaves a pair of rows in shared memory, in the order of :func:`_weights`, and sums over pieces; their squares' sum."""
    NB: gl.constexpr = 1 if BATCH == 1 else 2
    V: gl.constexpr = 128 // BITS
    G: gl.constexpr = _group(STEPS)
    X: gl.constexpr = _stored_layout(G, NB, S, V)
    X5: gl.constexpr = gl.SliceLayout(5, X)
    X45: gl.constexpr = gl.SliceLayout(4, X5)
    X345: gl.constexpr = gl.SliceLayout(3, X45)
    X2345: gl.constexpr = gl.SliceLayout(2, X345)
    V_ONLY: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, X))))
    )
    g = gl.arange(0, G, gl.SliceLayout(1, X2345))[:, None, None, None, None, None]
    b = gl.arange(0, NB, gl.SliceLayout(0, X2345))[None, :, None, None, None, None]
    s = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(1, X345)))[None, None, :, None, None, None]
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, X45))))[None, None, None, :, None, None]
    q = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, X5)))))
    q = q[None, None, None, None, :, None]
    v = gl.arange(0, V // 4, V_ONLY)[None, None, None, None, None, :]
    row = 2 * pair + b
    x_groups = x_steps._reinterpret(
        gl.bfloat16, [(BATCH + 1) // 2 * STEPS // G, G, NB, S, 4, 32], gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    )
    total_groups = total_steps._reinterpret(
        gl.float32, [(BATCH + 1) // 2 * STEPS // G, G, S, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    square = gl.full([G, NB, S, 4, 4, V // 4], 0.0, gl.float32, X)
    for first in gl.static_range(0, STEPS, G):
        k = (((first + g) * S + s) * 4 + t) * V + q * (V // 4) + v
        x = gl.load(x_ptr + (row * DEPTH + k), (k < DEPTH) & (row < BATCH), other=0.0)
        if norm_ptr is not None:
            wide = x.to(gl.float32)
            square += wide * wide
            x = (wide * gl.load(norm_ptr + k, k < DEPTH, other=0.0)).to(gl.bfloat16)
        if BITS == 8:
            x = gl.join(x, x * 16.0)
        x = gl.reshape(x, [G, NB, S, 4, 4, 2, 2, 2])
        x = gl.reshape(gl.permute(x, [0, 1, 2, 3, 4, 6, 7, 5]), [G, NB, S, 4, 32])
        total = gl.permute(gl.sum(x.to(gl.float32), 4), [0, 2, 1, 3])
        if NB == 1:
            total = gl.permute(gl.join(total, total), [0, 1, 2, 4, 3])
        x_groups.index(pair * (STEPS // G) + first // G).store(x)
        total_groups.index(pair * (STEPS // G) + first // G).store(gl.reshape(total, [G, S, 8]))
    return gl.sum(gl.sum(gl.sum(gl.sum(gl.sum(square, 5), 4), 3), 2), 0)


@gluon.jit
def _masked(x, mask):
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [x, mask], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _operands(
    x_steps, total_steps, step, BATCH: gl.constexpr, STEPS: gl.constexpr, S: gl.constexpr
):  # fmt: skip
    """Tuples over pairs of rows: the right operand of a step, and its sums over each piece, [S, 1, C]."""
    X: gl.constexpr = _spread_layout(S)
    SUMS: gl.constexpr = _mma_layout(S)
    t_T = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, X)))))
    b_B = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, X)))))
    c_C = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, X)))))
    own = c_C[None, None, None, None, :] == t_T[None, :, None, None, None]
    own = own & (b_B[None, None, None, :, None] < BATCH)
    mask = gl.where(own, -1, 0).to(gl.int16)
    operands = ()
    totals = ()
    for pair in gl.static_range((BATCH + 1) // 2):
        held = x_steps.index(pair * STEPS + step)
        x = gl.expand_dims(held.permute([1, 2, 3, 0]).load(gl.SliceLayout(4, X)), 4)
        x = _masked(x, mask)
        x = gl.reshape(x, [S, 4, 2, 16, 8])
        x = gl.reshape(gl.permute(x, [0, 2, 1, 3, 4]), [S, 128, 8])
        x = gl.convert_layout(x, gl.DotOperandLayout(1, SUMS, 16), assert_trivial=True)
        operands = operands + (x,)
        total = total_steps.index(pair * STEPS + step).load(gl.SliceLayout(1, SUMS))
        totals = totals + (gl.expand_dims(total, 1),)
    return operands, totals


@gluon.jit
def _write(
    sum_SRC, up_SRC, square_B, row, pair: gl.constexpr, y_ptr, h_ptr, columns, eps,
    BATCH: gl.constexpr, DEPTH: gl.constexpr, GEGLU: gl.constexpr, NORM: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Sums over warps and pieces, the norm's factor, GeGLU, residual, one rounding."""
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [S, 1], [1, 0])
    sum_RB = gl.sum(gl.sum(gl.reshape(sum_SRC, [S, 16, 2, 4]), 3), 0)
    y_RB = gl.convert_layout(sum_RB, OUT)
    if NORM:
        square_1B = gl.convert_layout(square_B, gl.SliceLayout(0, OUT))[None, :]
        factor = gl.rsqrt(square_1B / DEPTH + eps)
        y_RB = y_RB * factor
    if GEGLU:
        up_RB = gl.convert_layout(gl.sum(gl.sum(gl.reshape(up_SRC, [S, 16, 2, 4]), 3), 0), OUT)
        if NORM:
            up_RB = up_RB * factor
        y_RB = gelu_tanh(y_RB) * up_RB
    row_R = row + gl.arange(0, 16, gl.SliceLayout(1, OUT))
    b_B = 2 * pair + gl.arange(0, 2, gl.SliceLayout(0, OUT))
    inside = (row_R < columns)[:, None] & (b_B < BATCH)[None, :]
    offset = b_B[None, :] * columns + row_R[:, None]
    if h_ptr is not None:
        y_RB += gl.load(h_ptr + offset, inside, other=0.0).to(gl.float32)
    gl.store(y_ptr + offset, y_RB.to(y_ptr.dtype.element_ty), inside)


@gluon.jit
def _add_tile(sums, tile, operands, totals, weights, i: gl.constexpr, BITS: gl.constexpr, S: gl.constexpr):
    """Sums of tile ``i``, a tuple over pairs of rows, with a step more."""
    _, _, zeros_ptr, minimums_ptr = weights
    half_SRTH, scale_SRC, zero_SRC, minimum_SRC = tile
    w_SRK = _weights(half_SRTH, S)
    scale_SRC = scale_SRC.to(gl.float32)
    # A block of 8 bits has each of its activations 17 times among the totals: once, and times 16.
    SHARE: gl.constexpr = 1.0 if BITS == 4 else 1.0 / 17.0
    if zeros_ptr is None:
        base_SRC = 128.0 + SHARE * (1 << (BITS - 1))
    else:
        base_SRC = _base(zero_SRC, BITS, S)
    PAIRS: gl.constexpr = len(operands)
    new = ()
    for pair in gl.static_range(PAIRS):
        nothing_SRC = gl.full([S, 16, 8], 0.0, gl.float32, _mma_layout(S))
        part_SRC = mma_v2(w_SRK, operands[pair], nothing_SRC) - base_SRC * totals[pair]
        sum_SRC = sums[i * PAIRS + pair] + part_SRC * scale_SRC
        if minimums_ptr is not None:
            sum_SRC -= minimum_SRC * (totals[pair] * SHARE)
        new = new + (sum_SRC,)
    return new


@gluon.jit
def _load_tiles(
    weights, row, columns, step,
    DEPTH: gl.constexpr, BITS: gl.constexpr, KINDS: gl.constexpr, TILES: gl.constexpr, MASK: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """A tuple over kinds and tiles: a step of each."""
    tiles = ()
    for kind in gl.static_range(KINDS):
        for m in gl.static_range(TILES):
            first = kind * columns + row + 16 * m
            tiles = tiles + (_load_tile(weights, first, (kind + 1) * columns, step, DEPTH, BITS, MASK, S),)
    return tiles


@gluon.jit
def _round(
    sums, tiles, x_steps, total_steps, weights, row, columns, step, NEXT: gl.constexpr, LAST: gl.constexpr,
    BATCH: gl.constexpr, DEPTH: gl.constexpr, BITS: gl.constexpr, KINDS: gl.constexpr, TILES: gl.constexpr,
    AHEAD: gl.constexpr, STEPS: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """``AHEAD`` steps from ``step``; each, once done with, makes room for the loads of one of the next round."""
    next_tiles = ()
    for a in gl.static_range(AHEAD):
        operands, totals = _operands(x_steps, total_steps, step + a, BATCH, STEPS, S)
        new = ()
        for i in gl.static_range(KINDS * TILES):
            new = new + _add_tile(sums, tiles[a * KINDS * TILES + i], operands, totals, weights, i, BITS, S)
        sums = new
        if not LAST:
            ahead = step + AHEAD + a
            next_tiles = next_tiles + _load_tiles(
                weights, row, columns, ahead, DEPTH, BITS, KINDS, TILES, partial(NEXT, a, DEPTH, BITS, S, AHEAD), S
            )
    return sums, next_tiles


@gluon.jit
def matvec_spread_kernel(
    x_ptr, norm_ptr, w_ptr, scales_ptr, zeros_ptr, minimums_ptr, y_ptr, h_ptr, columns, eps,
    BATCH: gl.constexpr, DEPTH: gl.constexpr, BITS: gl.constexpr, GEGLU: gl.constexpr, DEPENDENT: gl.constexpr,
    TILES: gl.constexpr, AHEAD: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """``TILES`` tiles of 16 columns a program; weights of ``AHEAD`` steps are on their way."""
    release(DEPENDENT)
    PIECES: gl.constexpr = DEPTH * BITS // 128
    ROUNDS: gl.constexpr = (PIECES + 4 * S * AHEAD - 1) // (4 * S * AHEAD)
    G: gl.constexpr = _group(ROUNDS * AHEAD)
    STEPS: gl.constexpr = (ROUNDS * AHEAD + G - 1) // G * G
    PAIRS: gl.constexpr = (BATCH + 1) // 2
    NB: gl.constexpr = 1 if BATCH == 1 else 2
    KINDS: gl.constexpr = 2 if GEGLU else 1
    weights = (w_ptr, scales_ptr, zeros_ptr, minimums_ptr)
    row = gl.program_id(0) * (16 * TILES)
    x_steps = gl.allocate_shared_memory(
        gl.bfloat16, [PAIRS * STEPS, NB, S, 4, 32], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    )
    total_steps = gl.allocate_shared_memory(gl.float32, [PAIRS * STEPS, S, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    tiles = ()
    for a in gl.static_range(AHEAD):
        tiles = tiles + _load_tiles(
            weights, row, columns, a, DEPTH, BITS, KINDS, TILES, partial(0, a, DEPTH, BITS, S, AHEAD), S
        )
    wait(DEPENDENT)
    squares = ()
    for pair in gl.static_range(PAIRS):
        squares = squares + (_stage(x_ptr, norm_ptr, x_steps, total_steps, pair, BATCH, DEPTH, BITS, STEPS, S),)
    gl.thread_barrier()  # once, instead of in every round
    sums = ()
    for _ in gl.static_range(KINDS * TILES * PAIRS):
        sums = sums + (gl.full([S, 16, 8], 0.0, gl.float32, _mma_layout(S)),)
    if ROUNDS <= 2:
        for i in gl.static_range(ROUNDS):
            sums, tiles = _round(
                sums, tiles, x_steps, total_steps, weights, row, columns, i * AHEAD, (i + 1) * AHEAD, i == ROUNDS - 1,
                BATCH, DEPTH, BITS, KINDS, TILES, AHEAD, STEPS, S,
            )  # fmt: skip
    else:
        for i in range(ROUNDS - 1):
            sums, tiles = _round(
                sums, tiles, x_steps, total_steps, weights, row, columns, i * AHEAD, -1, False,
                BATCH, DEPTH, BITS, KINDS, TILES, AHEAD, STEPS, S,
            )  # fmt: skip
        sums, tiles = _round(
            sums, tiles, x_steps, total_steps, weights, row, columns, (ROUNDS - 1) * AHEAD, -1, True,
            BATCH, DEPTH, BITS, KINDS, TILES, AHEAD, STEPS, S,
        )  # fmt: skip
    for m in gl.static_range(TILES):
        for pair in gl.static_range(PAIRS):
            sum_SRC = sums[m * PAIRS + pair]
            up_SRC = sums[((KINDS - 1) * TILES + m) * PAIRS + pair]
            _write(
                sum_SRC, up_SRC, squares[pair], row + 16 * m, pair, y_ptr, h_ptr, columns, eps,
                BATCH, DEPTH, GEGLU, norm_ptr is not None, S,
            )  # fmt: skip
