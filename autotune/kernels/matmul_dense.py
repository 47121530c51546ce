"""The product with bf16 weights: see :mod:`autotune.kernels.matmul` for what it computes.

Legend: M rows of x, N columns of y (rows of weights), K their common depth; in the kernel, those of a tile.

Tiles of x and of the weights come by pointers, or by tensor descriptors made on the device (the copy engine of
compute capability 9.0 and newer). With descriptors a program may stay for several tiles: the loop over tiles and the
loop over depth become one, so that the next tile's loads run while the last one is written.

Source: Triton's tutorials 03 and 09 for the order of tiles and the flattened loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from autotune.kernels.matmul_tile import tile_place, write_tile


@triton.jit
def _one_tile(
    tile, x_ptr, w_ptr, y_ptr, bias_ptr, residual_ptr, x_tiles, w_tiles, y_tiles, rows, columns, depth,
    GELU: tl.constexpr, GEGLU: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, column = tile_place(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_MN = sum_MN
    if x_tiles is not None:
        for k in tl.range(0, depth, BLOCK_K):
            x_MK = x_tiles.load([row, k])
            if TRANSPOSED:
                w_KN = w_tiles.load([k, column])
            else:
                w_KN = w_tiles.load([column, k]).T
            sum_MN = tl.dot(x_MK, w_KN, sum_MN)
            if GEGLU:
                up_MN = tl.dot(x_MK, w_tiles.load([columns + column, k]).T, up_MN)
    else:
        k_K = tl.arange(0, BLOCK_K)
        row_M = tl.minimum(row + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
        column_N = tl.minimum(column + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
        x_MK_ptr = x_ptr + row_M[:, None] * depth + k_K[None, :]
        if TRANSPOSED:
            w_KN_ptr = w_ptr + k_K.to(tl.int64)[:, None] * columns + column_N[None, :]
        else:
            w_KN_ptr = w_ptr + column_N[None, :] * depth + k_K[:, None]
        up_KN_ptr = w_KN_ptr
        if GEGLU:
            up_KN_ptr = w_ptr + (column_N + columns)[None, :] * depth + k_K[:, None]
        for k in tl.range(0, depth, BLOCK_K):
            if EVEN_K:
                x_MK = tl.load(x_MK_ptr)
                w_KN = tl.load(w_KN_ptr)
            else:
                x_MK = tl.load(x_MK_ptr, (k_K < depth - k)[None, :], other=0.0)
                w_KN = tl.load(w_KN_ptr, (k_K < depth - k)[:, None], other=0.0)
            sum_MN = tl.dot(x_MK, w_KN, sum_MN)
            if GEGLU:
                if EVEN_K:
                    up_KN = tl.load(up_KN_ptr)
                else:
                    up_KN = tl.load(up_KN_ptr, (k_K < depth - k)[:, None], other=0.0)
                up_MN = tl.dot(x_MK, up_KN, up_MN)
                up_KN_ptr += BLOCK_K
            x_MK_ptr += BLOCK_K
            w_KN_ptr += BLOCK_K * columns if TRANSPOSED else BLOCK_K
    write_tile(
        sum_MN, up_MN, row, column, y_ptr, y_tiles, bias_ptr, residual_ptr, rows, columns,
        GELU, GEGLU, PARTS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def matmul_dense_kernel(
    x_ptr, w_ptr, y_ptr, bias_ptr, residual_ptr, rows, columns, depth,
    GELU: tl.constexpr, GEGLU: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DESCRIPTOR_Y: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program a tile, or, with PERSISTENT, every tile whose number is the program's modulo their count."""
    x_tiles = None
    w_tiles = None
    y_tiles = None
    if DESCRIPTORS:
        x_tiles = tl.make_tensor_descriptor(x_ptr, [rows, depth], [depth, 1], [BLOCK_M, BLOCK_K])
        if TRANSPOSED:
            w_tiles = tl.make_tensor_descriptor(w_ptr, [depth, columns], [columns, 1], [BLOCK_K, BLOCK_N])
        else:
            w_rows = columns * 2 if GEGLU else columns
            w_tiles = tl.make_tensor_descriptor(w_ptr, [w_rows, depth], [depth, 1], [BLOCK_N, BLOCK_K])
    if DESCRIPTOR_Y:
        y_tiles = tl.make_tensor_descriptor(y_ptr, [rows, columns], [columns, 1], [BLOCK_M, BLOCK_N // PARTS])
    if PERSISTENT:
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _one_tile(
                tile, x_ptr, w_ptr, y_ptr, bias_ptr, residual_ptr, x_tiles, w_tiles, y_tiles, rows, columns, depth,
                GELU, GEGLU, TRANSPOSED, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS,
            )  # fmt: skip
    else:
        _one_tile(
            tl.program_id(0), x_ptr, w_ptr, y_ptr, bias_ptr, residual_ptr, x_tiles, w_tiles, y_tiles, rows, columns,
            depth, GELU, GEGLU, TRANSPOSED, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS,
        )  # fmt: skip
