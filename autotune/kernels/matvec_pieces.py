"""The Gluon function of :mod:`autotune.kernels.matvec` for weights in blocks: made bf16 where they were loaded, in registers.

Legend: S warps, each with a part of the depth; R = 16 rows of weights in a tile; a piece is the 16 bytes of a row that a
thread loads: V = 32 codes of 4 bits, a block, or 16 of 8 bits, half a block; T = 4 pieces side by side in a step of a warp,
H = 8 half-words in a piece; K = 128 half-bytes, the depth of a step; B rows of activations, 8 or 16 for the matrix units.

Half-bytes become bf16 by two bits of logic, two at a time: they are the low mantissa bits of 128.0. The zero point is taken
off with the 128, which is exact, and the scale, rounded to bf16, multiplied on. A code of 8 bits is two half-bytes, the upper
one worth 16: its activations stand there twice, once times 16.

The order of the depth within a step is free as long as both operands share it. It is that of the matrix units' registers,
in which thread t of a group of 4 holds piece t as it was loaded. So no weight crosses from thread to thread, and none goes
through shared memory.

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


@gluon.constexpr_function
def bases(count, *position):
    """Bases of a linear layout: ``count`` = 2**n elements along the axis that ``position`` marks, from that stride."""
    found = []
    step = 1
    while step < count:
        found.append([step * p for p in position])
        step *= 2
    return found


@gluon.constexpr_function
def partial(first, a, depth, bits, warps, ahead):
    """Whether step ``a`` of the round that begins with step ``first`` may reach beyond the depth; -1 for any round."""
    pieces = depth * bits // 128
    if first < 0:
        return pieces % (4 * warps * ahead) != 0
    return (first + a + 1) * 4 * warps > pieces


@gluon.constexpr_function
def _sum_layout(S):
    """[S, R, B]."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[S, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def _code_layout(S):
    """[S, R, T, H]."""
    return gl.DistributedLinearLayout(
        reg_bases=bases(8, 0, 0, 0, 1) + [[0, 8, 0, 0]],
        lane_bases=bases(4, 0, 0, 1, 0) + bases(8, 0, 1, 0, 0),
        warp_bases=bases(S, 1, 0, 0, 0),
        block_bases=[],
        shape=[S, 16, 4, 8],
    )


@gluon.constexpr_function
def _x_layout(S, V, B):
    """[S, T, V, B]."""
    return gl.DistributedLinearLayout(
        reg_bases=bases(V, 0, 0, 1, 0) + bases(B // 8, 0, 0, 0, 8),
        lane_bases=bases(4, 0, 1, 0, 0) + bases(8, 0, 0, 0, 1),
        warp_bases=bases(S, 1, 0, 0, 0),
        block_bases=[],
        shape=[S, 4, V, B],
    )


@gluon.jit
def _numbers(half_SRTH, even_SRTH, odd_SRTH, scale_SRTH, rest_SRTH):
    """bf16 of each half-byte of uint16 half-words, the lowest first, as four tensors; two half-words at a time.

    ``even``: -128 - zero for the first and third, ``odd`` for the others. ``rest``: what rounding took off the scale.
    """
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b32 a, b, c, d, r, one, none;
            mov.b32 one, 0x3F803F80;
            mov.b32 none, 0x80008000;
            shr.u32 b, $4, 4;
            shr.u32 c, $4, 8;
            shr.u32 d, $4, 12;
            lop3.b32 a, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 a, a, one, $5;
            fma.rn.bf16x2 b, b, one, $6;
            fma.rn.bf16x2 c, c, one, $5;
            fma.rn.bf16x2 d, d, one, $6;
            fma.rn.bf16x2 r, a, $8, none;
            fma.rn.bf16x2 $0, a, $7, r;
            fma.rn.bf16x2 r, b, $8, none;
            fma.rn.bf16x2 $1, b, $7, r;
            fma.rn.bf16x2 r, c, $8, none;
            fma.rn.bf16x2 $2, c, $7, r;
            fma.rn.bf16x2 r, d, $8, none;
            fma.rn.bf16x2 $3, d, $7, r;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r,r",
        [half_SRTH, even_SRTH, odd_SRTH, scale_SRTH, rest_SRTH],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _load_tile(
    weights, row, columns, step,
    DEPTH: gl.constexpr, BITS: gl.constexpr, MASK: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """A step of one tile as stored: half-words [S, R, T, H], scales and zeros [S, R, T]."""
    codes_ptr, scales_ptr, zeros_ptr = weights
    PIECES: gl.constexpr = DEPTH * BITS // 128
    BLOCKS: gl.constexpr = DEPTH // 32
    CODES: gl.constexpr = _code_layout(S)
    GRID: gl.constexpr = gl.SliceLayout(3, CODES)
    row_R = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, GRID)))
    row_R1 = gl.minimum(row + row_R, columns - 1).to(gl.int64)[None, :, None]
    s_S = gl.arange(0, S, gl.SliceLayout(1, gl.SliceLayout(2, GRID)))[:, None, None]
    piece = (step * S + s_S) * 4 + gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, GRID)))[None, None, :]
    block = piece if BITS == 4 else piece // 2
    inside = (piece < PIECES) & (row_R1 >= 0)
    h_H = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, CODES))))[None, None, None, :]
    half = gl.expand_dims(row_R1 * (PIECES * 8) + piece * 8, 3) + h_H
    half_ptr = codes_ptr.to(gl.pointer_type(gl.uint16), bitcast=True) + half
    # What is left undefined is finite, whatever its bits are, and meets a scale or activations of zero.
    scale_SRT = 0
    zero_SRT = 0
    if MASK:
        other: gl.constexpr = 0 if BITS == 16 else None
        half_SRTH = gl.load(
            half_ptr, gl.expand_dims(inside, 3) & (h_H >= 0), other=other, eviction_policy="evict_first"
        )
    else:
        half_SRTH = gl.load(half_ptr, eviction_policy="evict_first")
    if scales_ptr is not None:
        if MASK:
            scale_SRT = gl.load(scales_ptr + (row_R1 * BLOCKS + block), inside, other=0.0)
        else:
            scale_SRT = gl.load(scales_ptr + (row_R1 * BLOCKS + block))
    if zeros_ptr is not None:
        place = row_R1 * BLOCKS + block if BITS == 8 else row_R1 * ((BLOCKS + 1) // 2) + block // 2
        if MASK:
            zero_SRT = gl.load(zeros_ptr + place, inside)
        else:
            zero_SRT = gl.load(zeros_ptr + place)
    return half_SRTH, scale_SRT, zero_SRT


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
def _negative(half_byte):
    """bf16 -128 - n, n an integer below 16."""
    return (half_byte | 0xC300).to(gl.int16).to(gl.bfloat16, bitcast=True)


@gluon.jit
def _left(w, S: gl.constexpr, WIDTH: gl.constexpr):
    return gl.convert_layout(w, gl.DotOperandLayout(0, _sum_layout(S), WIDTH), assert_trivial=True)


@gluon.jit
def _weights(tile, zeros_ptr, BITS: gl.constexpr, S: gl.constexpr):
    """bf16 [S, R, K], the left operand.

    Bits of the place in K are, from above: for codes half-word 4, T, half-word 2, half-byte, half-word 1; for weights of
    bf16 half-word 4, T, half-word 2, half-word 1.
    """
    half_SRTH, scale_SRT, zero_SRT = tile
    if BITS == 16:
        w = gl.reshape(half_SRTH.to(gl.bfloat16, bitcast=True), [S, 16, 4, 2, 4])
        w_SRK = _left(gl.reshape(gl.permute(w, [0, 1, 3, 2, 4]), [S, 16, 32]), S, 4)
    else:
        GRID: gl.constexpr = gl.SliceLayout(3, _code_layout(S))
        if zeros_ptr is None:
            even = gl.full([S, 16, 4], -136.0 if BITS == 4 else -128.0, gl.bfloat16, GRID)
            odd = gl.full([S, 16, 4], -136.0, gl.bfloat16, GRID)
        elif BITS == 4:
            t_T = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, GRID)))[None, None, :]
            even = _negative((zero_SRT.to(gl.int32) >> (t_T % 2 * 4)) & 15)
            odd = even
        else:
            even = _negative(zero_SRT.to(gl.int32) & 15)
            odd = _negative(zero_SRT.to(gl.int32) >> 4)
        scale = scale_SRT.to(gl.bfloat16)
        rest = gl.expand_dims((scale_SRT.to(gl.float32) - scale.to(gl.float32)).to(gl.bfloat16), 3)
        scale = gl.expand_dims(scale, 3)
        q0, q1, q2, q3 = _numbers(half_SRTH, gl.expand_dims(even, 3), gl.expand_dims(odd, 3), scale, rest)
        q = gl.join(gl.join(q0, q2), gl.join(q1, q3))  # [S, R, T, H, 2, 2], half-bytes in order
        q = gl.reshape(q, [S, 16, 4, 2, 2, 2, 2, 2])
        w_SRK = _left(gl.reshape(gl.permute(q, [0, 1, 3, 2, 4, 6, 7, 5]), [S, 16, 128]), S, 16)
    return w_SRK


@gluon.jit
def _operand(x_STVB, BITS: gl.constexpr, S: gl.constexpr, B: gl.constexpr):
    """bf16 [S, K, B], the right operand, in the order of :func:`_weights`."""
    if BITS == 16:
        x = gl.permute(gl.reshape(x_STVB, [S, 4, 2, 4, B]), [0, 2, 1, 3, 4])
    elif BITS == 4:
        x = gl.reshape(x_STVB, [S, 4, 2, 2, 2, 2, 2, B])
        x = gl.permute(x, [0, 2, 1, 3, 5, 6, 4, 7])
    else:
        x = gl.join(x_STVB, x_STVB * 16.0)
        x = gl.reshape(x, [S, 4, 2, 2, 2, 2, B, 2])
        x = gl.permute(x, [0, 2, 1, 3, 5, 7, 4, 6])
    K: gl.constexpr = 32 if BITS == 16 else 128
    WIDTH: gl.constexpr = 4 if BITS == 16 else 16
    return gl.convert_layout(
        gl.reshape(x, [S, K, B]), gl.DotOperandLayout(1, _sum_layout(S), WIDTH), assert_trivial=True
    )


@gluon.jit
def _load_x(
    x_ptr, step, BATCH: gl.constexpr, DEPTH: gl.constexpr, BITS: gl.constexpr, S: gl.constexpr, B: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """bf16 [S, T, V, B]; rows of a batch that is smaller come again."""
    V: gl.constexpr = 128 // BITS
    X: gl.constexpr = _x_layout(S, V, B)
    s_S = gl.arange(0, S, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, X))))[:, None, None, None]
    t_T = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, X))))[None, :, None, None]
    v_V = gl.arange(0, V, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, X))))[None, None, :, None]
    b_B = gl.arange(0, B, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, X))))[None, None, None, :]
    k = ((step * S + s_S) * 4 + t_T) * V + v_V
    ptr = x_ptr + (gl.minimum(b_B, BATCH - 1) * DEPTH + k)
    if MASK:
        x_STVB = gl.load(ptr, (k < DEPTH) & (b_B >= 0), other=0.0)
    else:
        x_STVB = gl.load(ptr)
    return x_STVB


@gluon.jit
def gelu_tanh(x):
    """As :func:`autotune.kernels.matmul_tile.gelu_tanh` has it."""
    exponent = x * (-2.302208198 - 0.1029432397 * x * x)
    return x / (1.0 + gl.exp2(exponent))


@gluon.jit
def _write(
    sum_SRB, up_SRB, row, y_ptr, h_ptr, columns,
    BATCH: gl.constexpr, GEGLU: gl.constexpr, S: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """Sums over warps, GeGLU, residual, one rounding."""
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, S], [0, 1])
    y_RB = gl.convert_layout(gl.sum(sum_SRB, 0), OUT)
    if GEGLU:
        y_RB = gelu_tanh(y_RB) * gl.convert_layout(gl.sum(up_SRB, 0), OUT)
    row_R = row + gl.arange(0, 16, gl.SliceLayout(1, OUT))
    b_B = gl.arange(0, B, gl.SliceLayout(0, OUT))
    inside_RB = (row_R < columns)[:, None] & (b_B < BATCH)[None, :]
    offset_RB = b_B[None, :] * columns + row_R[:, None]
    if h_ptr is not None:
        y_RB += gl.load(h_ptr + offset_RB, inside_RB, other=0.0).to(gl.float32)
    gl.store(y_ptr + offset_RB, y_RB.to(y_ptr.dtype.element_ty), inside_RB)


@gluon.jit
def _round(
    sums, tiles, xs, x_ptr, weights, row, columns, step, NEXT: gl.constexpr, LAST: gl.constexpr,
    BATCH: gl.constexpr, DEPTH: gl.constexpr, BITS: gl.constexpr, KINDS: gl.constexpr, TILES: gl.constexpr,
    AHEAD: gl.constexpr, B: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """``AHEAD`` steps from ``step``; each, once done with, makes room for the loads of one of the next round.

    ``NEXT``: the first step of the next round where it is known to the compiler, else -1.
    """
    next_tiles = ()
    next_xs = ()
    for a in gl.static_range(AHEAD):
        x_SKB = _operand(xs[a], BITS, S, B)
        new = ()
        for i in gl.static_range(KINDS * TILES):
            new = new + (mma_v2(_weights(tiles[a * KINDS * TILES + i], weights[2], BITS, S), x_SKB, sums[i]),)
        sums = new
        if not LAST:
            ahead = step + AHEAD + a
            next_tiles = next_tiles + _load_tiles(
                weights, row, columns, ahead, DEPTH, BITS, KINDS, TILES, partial(NEXT, a, DEPTH, BITS, S, AHEAD), S
            )
            next_xs = next_xs + (
                _load_x(x_ptr, ahead, BATCH, DEPTH, BITS, S, B, partial(NEXT, a, DEPTH, BITS, S, AHEAD)),
            )
    return sums, next_tiles, next_xs


@gluon.jit
def matvec_pieces_kernel(
    x_ptr, w_ptr, scales_ptr, zeros_ptr, y_ptr, h_ptr, columns,
    BATCH: gl.constexpr, DEPTH: gl.constexpr, BITS: gl.constexpr, GEGLU: gl.constexpr, DEPENDENT: gl.constexpr,
    TILES: gl.constexpr, AHEAD: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """``TILES`` tiles of 16 columns a program; weights and activations of ``AHEAD`` steps are on their way to registers."""
    release(DEPENDENT)
    STEPS: gl.constexpr = (DEPTH * BITS // 128 + 4 * S - 1) // (4 * S)
    ROUNDS: gl.constexpr = (STEPS + AHEAD - 1) // AHEAD
    KINDS: gl.constexpr = 2 if GEGLU else 1
    B: gl.constexpr = 16 if BATCH > 8 else 8
    weights = (w_ptr, scales_ptr, zeros_ptr)
    row = gl.program_id(0) * (16 * TILES)
    tiles = ()
    for a in gl.static_range(AHEAD):
        tiles = tiles + _load_tiles(
            weights, row, columns, a, DEPTH, BITS, KINDS, TILES, partial(0, a, DEPTH, BITS, S, AHEAD), S
        )
    wait(DEPENDENT)
    xs = ()
    for a in gl.static_range(AHEAD):
        xs = xs + (_load_x(x_ptr, a, BATCH, DEPTH, BITS, S, B, partial(0, a, DEPTH, BITS, S, AHEAD)),)
    sums = ()
    for _ in gl.static_range(KINDS * TILES):
        sums = sums + (gl.full([S, 16, B], 0.0, gl.float32, _sum_layout(S)),)
    if ROUNDS <= 2:
        for i in gl.static_range(ROUNDS):
            sums, tiles, xs = _round(
                sums, tiles, xs, x_ptr, weights, row, columns, i * AHEAD, (i + 1) * AHEAD, i == ROUNDS - 1,
                BATCH, DEPTH, BITS, KINDS, TILES, AHEAD, B, S,
            )  # fmt: skip
    else:
        for i in range(ROUNDS - 1):
            sums, tiles, xs = _round(
                sums, tiles, xs, x_ptr, weights, row, columns, i * AHEAD, -1, False,
                BATCH, DEPTH, BITS, KINDS, TILES, AHEAD, B, S,
            )  # fmt: skip
        sums, tiles, xs = _round(
            sums, tiles, xs, x_ptr, weights, row, columns, (ROUNDS - 1) * AHEAD, -1, True,
            BATCH, DEPTH, BITS, KINDS, TILES, AHEAD, B, S,
        )  # fmt: skip
    for m in gl.static_range(TILES):
        up_SRB = sums[(KINDS - 1) * TILES + m]
        _write(sums[m], up_SRB, row + 16 * m, y_ptr, h_ptr, columns, BATCH, GEGLU, S, B)
