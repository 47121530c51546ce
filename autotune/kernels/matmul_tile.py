"""What both products of :mod:`autotune.kernels.matmul` share: the order of tiles, and what follows the sum.

Legend: M rows in a tile, N columns in a tile. Everything here is inlined into the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_place(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of a tile. GROUP tiles of rows share their columns of weights in the L2 cache."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    in_group = GROUP * tl.cdiv(columns, BLOCK_N)
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return (first + tile % in_group % height) * BLOCK_M, tile % in_group // height * BLOCK_N


@triton.jit
def gelu_tanh(x):
    """GELU's tanh form, x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    exponent = x * (-2.302208198 - 0.1029432397 * x * x)  # -2 u log2(e)
    return x / (1.0 + tl.exp2(exponent))


@triton.jit
def _write_part(
    sum_MN, up_MN, row, column, y_ptr, y_tiles, bias_ptr, residual_ptr, rows, columns,
    GELU: tl.constexpr, GEGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_M = row + tl.arange(0, BLOCK_M)
    column_N = column + tl.arange(0, BLOCK_N)
    inside_MN = (row_M < rows)[:, None] & (column_N < columns)[None, :]
    offset_MN = row_M.to(tl.int64)[:, None] * columns + column_N[None, :]
    if bias_ptr is not None:
        sum_MN += tl.load(bias_ptr + column_N, column_N < columns, other=0.0).to(tl.float32)[None, :]
        if GEGLU:
            up_MN += tl.load(bias_ptr + columns + column_N, column_N < columns, other=0.0).to(tl.float32)[None, :]
    if GELU or GEGLU:
        sum_MN = gelu_tanh(sum_MN)
    if GEGLU:
        sum_MN *= up_MN
    if residual_ptr is not None:
        sum_MN += tl.load(residual_ptr + offset_MN, inside_MN, other=0.0).to(tl.float32)
    y_MN = sum_MN.to(y_ptr.dtype.element_ty)
    if y_tiles is not None:
        y_tiles.store([row, column], y_MN)
    else:
        tl.store(y_ptr + offset_MN, y_MN, inside_MN)


@triton.jit
def write_tile(
    sum_MN, up_MN, row, column, y_ptr, y_tiles, bias_ptr, residual_ptr, rows, columns,
    GELU: tl.constexpr, GEGLU: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias, activation and residual in fp32, and one rounding; in PARTS 1 or 2, of which each takes its shared memory."""
    if PARTS == 1:
        _write_part(
            sum_MN, up_MN, row, column, y_ptr, y_tiles, bias_ptr, residual_ptr, rows, columns,
            GELU, GEGLU, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left_MH, right_MH = tl.split(tl.permute(tl.reshape(sum_MN, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        up_left_MH, up_right_MH = left_MH, right_MH
        if GEGLU:
            up_left_MH, up_right_MH = tl.split(tl.permute(tl.reshape(up_MN, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _write_part(
            left_MH, up_left_MH, row, column, y_ptr, y_tiles, bias_ptr, residual_ptr, rows, columns,
            GELU, GEGLU, BLOCK_M, HALF,
        )  # fmt: skip
        _write_part(
            right_MH, up_right_MH, row, column + HALF, y_ptr, y_tiles, bias_ptr, residual_ptr, rows, columns,
            GELU, GEGLU, BLOCK_M, HALF,
        )  # fmt: skip
