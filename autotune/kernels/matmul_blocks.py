"""The product with weights in blocks of 32, and the step that makes them bf16: see :mod:`autotune.kernels.matmul`.

Legend: M rows of x, N rows of weights, K their common depth, n = ceil(K / 32) blocks in a row; in the kernels, those
of a tile. P bytes of codes.

    w[n, k] = (code[n, k] - zero[n, k // 32]) scale[n, k // 32]                 zero: the middle code, or an integer
    w[n, k] = (code[n, k] - middle) scale[n, k // 32] - minimum[n, k // 32]     the grid of q4_K

Codes of 8 bits lie one a byte, of 4 bits two a byte, the even one low. Integer zeros lie as their codes do, one a
block. A row has a whole number of blocks; codes behind column K are whatever they are.

In the loop the weights are the left operand, which may come from registers: they never go back to shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.kernels.matmul_tile import tile_place, write_tile

BLOCK = 32


def dequantise_oracle(
    codes_NP: Tensor, scales_Nn: Tensor, zeros_NP: Tensor | None, minimums_Nn: Tensor | None, bits: int, depth: int
) -> Tensor:
    """The weights that the codes stand for: [N, K] in the dtype of ``scales_Nn``."""
    rows, blocks = scales_Nn.shape
    codes_Nnb = _unpacked(codes_NP, bits)[:, : blocks * BLOCK].view(rows, blocks, BLOCK)
    middle = 1 << (bits - 1)
    zeros_Nn1 = middle if zeros_NP is None else _unpacked(zeros_NP, bits)[:, :blocks, None].int()
    w_Nnb = (codes_Nnb.int() - zeros_Nn1) * scales_Nn[:, :, None]
    if minimums_Nn is not None:
        w_Nnb = w_Nnb - minimums_Nn[:, :, None]
    return w_Nnb.flatten(1)[:, :depth]


def _unpacked(packed_NP: Tensor, bits: int) -> Tensor:
    return packed_NP if bits == 8 else torch.stack([packed_NP & 15, packed_NP >> 4], dim=2).flatten(1)


@triton.jit
def _weights(
    codes_ptr, scales_ptr, zeros_ptr, minimums_ptr, row_N, k, blocks,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """bf16 [BLOCK_N, BLOCK_K] of the rows ``row_N`` from column ``k``; finite behind the last block."""
    BLOCKS: tl.constexpr = BLOCK_K // 32
    block_n = k // 32 + tl.arange(0, BLOCKS)
    inside_n = (block_n < blocks)[None, :]
    offset_Nn = row_N[:, None] * blocks + block_n[None, :]
    if BITS == 4:
        byte_P = tl.arange(0, BLOCK_K // 2) + k // 2
        inside_P = (byte_P < blocks * 16)[None, :]
        packed_NP = tl.load(codes_ptr + row_N[:, None] * (blocks * 16) + byte_P[None, :], inside_P, other=0)
        codes_NK = tl.reshape(tl.join(packed_NP & 15, packed_NP >> 4), (BLOCK_N, BLOCK_K))
    else:
        byte_P = tl.arange(0, BLOCK_K) + k
        inside_P = (byte_P < blocks * 32)[None, :]
        codes_NK = tl.load(codes_ptr + row_N[:, None] * (blocks * 32) + byte_P[None, :], inside_P, other=0)
    # 2 ** 23 with the code in its lowest bits is 2 ** 23 + code: an addition in place of a slow conversion.
    codes_Nnb = tl.reshape(codes_NK.to(tl.int32) | 0x4B000000, (BLOCK_N, BLOCKS, 32)).to(tl.float32, bitcast=True)
    scales_Nn = tl.load(scales_ptr + offset_Nn, inside_n, other=0.0).to(tl.float32)
    if zeros_ptr is not None:
        if BITS == 4:
            zero_bytes = (blocks + 1) // 2
            pair_Nn = tl.load(zeros_ptr + row_N[:, None] * zero_bytes + (block_n // 2)[None, :], inside_n, other=0)
            zeros_Nn = (pair_Nn.to(tl.int32) >> (block_n % 2 * 4)[None, :]) & 15
        else:
            zeros_Nn = tl.load(zeros_ptr + offset_Nn, inside_n, other=0).to(tl.int32)
        base_Nn = zeros_Nn.to(tl.float32) + 8388608.0
        w_Nnb = (codes_Nnb - base_Nn[:, :, None]) * scales_Nn[:, :, None]
    else:
        MIDDLE: tl.constexpr = 8388608 + (1 << (BITS - 1))
        w_Nnb = (codes_Nnb - MIDDLE) * scales_Nn[:, :, None]
    if minimums_ptr is not None:
        minimums_Nn = tl.load(minimums_ptr + offset_Nn, inside_n, other=0.0).to(tl.float32)
        w_Nnb -= minimums_Nn[:, :, None]
    return tl.reshape(w_Nnb.to(tl.bfloat16), (BLOCK_N, BLOCK_K))


@triton.jit
def dequantise_kernel(
    codes_ptr, scales_ptr, zeros_ptr, minimums_ptr, w_ptr, rows, depth,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """bf16 weights [N, K], for products with so many rows that a pass over the weights costs little beside them."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = row_N < rows
    row_N = tl.minimum(row_N, rows - 1).to(tl.int64)
    start = tl.program_id(1) * BLOCK_K
    w_NK = _weights(
        codes_ptr, scales_ptr, zeros_ptr, minimums_ptr, row_N, start, tl.cdiv(depth, 32), BITS, BLOCK_N, BLOCK_K
    )
    k_K = start + tl.arange(0, BLOCK_K)
    tl.store(w_ptr + row_N[:, None] * depth + k_K[None, :], w_NK, inside_N[:, None] & (k_K < depth)[None, :])


@triton.jit
def matmul_blocks_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, minimums_ptr, y_ptr, bias_ptr, residual_ptr, rows, columns, depth,
    BITS: tl.constexpr, GELU: tl.constexpr, GEGLU: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of y a program: its weights are unpacked on the way to the product, which is y transposed."""
    row, column = tile_place(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP)
    blocks = tl.cdiv(depth, 32)
    column_N = tl.minimum(column + tl.arange(0, BLOCK_N), columns - 1).to(tl.int64)
    row_M = tl.minimum(row + tl.arange(0, BLOCK_M), rows - 1).to(tl.int64)
    k_K = tl.arange(0, BLOCK_K)
    if DESCRIPTORS:
        x_tiles = tl.make_tensor_descriptor(x_ptr, [rows, depth], [depth, 1], [BLOCK_M, BLOCK_K])
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_NM = sum_NM
    for k in tl.range(0, depth, BLOCK_K):
        if DESCRIPTORS:
            x_KM = x_tiles.load([row, k]).T
        elif EVEN_K:
            x_KM = tl.load(x_ptr + row_M[None, :] * depth + (k + k_K)[:, None])
        else:
            x_KM = tl.load(x_ptr + row_M[None, :] * depth + (k + k_K)[:, None], (k_K < depth - k)[:, None], other=0.0)
        w_NK = _weights(codes_ptr, scales_ptr, zeros_ptr, minimums_ptr, column_N, k, blocks, BITS, BLOCK_N, BLOCK_K)
        sum_NM = tl.dot(w_NK, x_KM, sum_NM)
        if GEGLU:
            up_NK = _weights(
                codes_ptr, scales_ptr, zeros_ptr, minimums_ptr, column_N + columns, k, blocks, BITS, BLOCK_N, BLOCK_K
            )
            up_NM = tl.dot(up_NK, x_KM, up_NM)
    write_tile(
        sum_NM.T, up_NM.T, row, column, y_ptr, None, bias_ptr, residual_ptr, rows, columns,
        GELU, GEGLU, 1, BLOCK_M, BLOCK_N,
    )  # fmt: skip
