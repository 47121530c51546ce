"""The product for Hopper in square tiles of 192 rows and columns, with three consumers.

As :mod:`autotune.kernels.matmul_hopper`, with another division of y. A tile this size loads less for each sum than one
of 128 by 256, and it fits where that leaves multiprocessors idle: 4,096 rows and 1,152 columns, two products in each of
SigLIP's layers, are 132 tiles, as many as an H100 has multiprocessors.

Each of three groups of four warps takes 64 rows, in two accumulators, since a tensor's sides are powers of two: 128
columns and 64. All that is loaded is in blocks of 64 rows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from autotune.kernels.matmul_hopper import BARRIER_BYTES, PART, barriers, descriptor, finish, place

SIDE = 192
_SIDE = gl.constexpr(SIDE)
_BLOCK = gl.constexpr(64)
"""Rows of a consumer, and of what is loaded at once; depth of a step."""
REGISTERS = 128
"""65,536 over the 512 threads of a program."""
CONSUMER_REGISTERS = gl.constexpr(160)
PRODUCER_REGISTERS = gl.constexpr(32)


def shared_bytes(stages: int) -> int:
    """The ring, a part of each consumer's rows on its way to memory, and the barriers."""
    return 2 * (stages * 2 * SIDE * 64 + SIDE * int(PART.value)) + BARRIER_BYTES


@gluon.jit
def _produce(x_desc, w_desc, ring, rows, columns, depth, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp: every tile's steps, in the order in which the consumers take them."""
    x_smem, wide_smem, narrow_smem, full, empty = ring
    tiles = (rows + _SIDE - 1) // _SIDE * ((columns + _SIDE - 1) // _SIDE)
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = place(tile, rows, columns, _SIDE, _SIDE, GROUP)
        for k in range(0, depth, _BLOCK):
            stage = count % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(bar, 2 * _SIDE * _BLOCK * 2)
            for i in gl.static_range(3):
                tma.async_copy_global_to_shared(x_desc, [row + i * _BLOCK, k], bar, x_smem.index(3 * stage + i))
            wide = wide_smem.index(stage)
            tma.async_copy_global_to_shared(w_desc, [column, k], bar, wide.slice(0, _BLOCK))
            tma.async_copy_global_to_shared(w_desc, [column + _BLOCK, k], bar, wide.slice(_BLOCK, _BLOCK))
            tma.async_copy_global_to_shared(w_desc, [column + 2 * _BLOCK, k], bar, narrow_smem.index(stage))
            count += 1


@gluon.jit
def _consume(ring, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns, depth, GELU: gl.constexpr,
             GROUP: gl.constexpr, STAGES: gl.constexpr, WHICH: gl.constexpr):  # fmt: skip
    """A consumer: a third of every tile's rows."""
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    narrow_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    x_smem, wide_smem, narrow_smem, full, empty = ring
    tiles = (rows + _SIDE - 1) // _SIDE * ((columns + _SIDE - 1) // _SIDE)
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = place(tile, rows, columns, _SIDE, _SIDE, GROUP)
        row += WHICH * _BLOCK
        wide_MN = gl.zeros([_BLOCK, 128], gl.float32, wide_layout)
        narrow_MN = gl.zeros([_BLOCK, 64], gl.float32, narrow_layout)
        for k in range(0, depth, _BLOCK):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            x = x_smem.index(3 * stage + WHICH)
            wide_MN = warpgroup_mma(x, wide_smem.index(stage).permute((1, 0)), wide_MN, is_async=True)
            narrow_MN = warpgroup_mma(x, narrow_smem.index(stage).permute((1, 0)), narrow_MN, is_async=True)
            # Both products of the step before are done: its buffers may be filled again.
            wide_MN, narrow_MN = warpgroup_mma_wait(2, deps=(wide_MN, narrow_MN))
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=k > 0)
            count += 1
        wide_MN, narrow_MN = warpgroup_mma_wait(0, deps=(wide_MN, narrow_MN))
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        finish(
            wide_MN, row, column, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns,
            GELU, False, WHICH, 1, _BLOCK, 128, 128,
        )  # fmt: skip
        finish(
            narrow_MN, row, column + 128, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns,
            GELU, False, WHICH, 1, _BLOCK, 64, 64,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def matmul_hopper_square_kernel(
    x_ptr, w_ptr, y_ptr, bias_ptr, residual_ptr, rows, columns, depth,
    GELU: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every tile whose number is the program's modulo their count."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_BLOCK, _BLOCK], gl.bfloat16)
    wide_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, _BLOCK], gl.bfloat16)
    x_desc = descriptor(x_ptr, rows, depth, _BLOCK, _BLOCK)
    w_desc = descriptor(w_ptr, columns, depth, _BLOCK, _BLOCK)
    y_desc = descriptor(y_ptr, rows, columns, _BLOCK, PART)
    ring = (
        gl.allocate_shared_memory(gl.bfloat16, [3 * STAGES, _BLOCK, _BLOCK], layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, _BLOCK], wide_layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, _BLOCK, _BLOCK], layout),
        barriers(STAGES, 1),
        barriers(STAGES, 3),
    )
    y_smem = gl.allocate_shared_memory(gl.bfloat16, [3, _BLOCK, PART], layout)
    gl.warp_specialize(
        [
            (_consume, (ring, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns, depth, GELU, GROUP, STAGES, 0)),
            (_consume, (ring, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns, depth, GELU, GROUP, STAGES, 1)),
            (_consume, (ring, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns, depth, GELU, GROUP, STAGES, 2)),
            (_produce, (x_desc, w_desc, ring, rows, columns, depth, GROUP, STAGES)),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
