"""The product with bf16 weights for Hopper, in Gluon: a warp that loads and warps that compute, in programs that stay.

Legend: a tile has BLOCK_M rows and WIDTH sums a row: BLOCK_N columns of y, or of gate and of up under GeGLU, side by
side; M rows of it are a consumer's; K is the depth of a step.

What :mod:`autotune.kernels.matmul_dense` computes, by groups of warps. One warp loads tiles of x and of the weights
through tensor descriptors into a ring of buffers. Two groups of four warps, the consumers, have half of the rows each
and keep all sums of a tile in registers. They share the weights that were loaded, but wait for no one else: one writes
its half while the other still multiplies, and the loads for the next tile run ahead of both. Under GeGLU a tile's
weights are rows of gate and as many of up, so that one instruction computes the sums of both.

Every buffer has two barriers: ``full``, completed by the bytes that arrive, and ``empty``, by the consumers that are
through with it. The n-th use of a buffer waits for parity n & 1 of ``full``, or for the parity before of ``empty``.

Source: CUTLASS's persistent kernels for Hopper, "cooperative" (media/docs/cpp/efficient_gemm.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

PART = gl.constexpr(64)
"""Columns of y that go through shared memory at once: 128 bytes a row, which one descriptor can swizzle."""
DEPTH = gl.constexpr(64)
"""Of a step; 128 bytes a row too."""
REGISTERS = 168
"""65,536 over the 384 threads of a program: ptxas counts a whole warpgroup for the loading warp."""
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
"""What the two sides have once the loading warp gave its own away."""
BARRIER_BYTES = 1024
"""Barriers, and what Triton keeps for itself."""


def parts_at_once(block_m: int, block_n: int) -> int:
    """Parts of a consumer's half that may be on their way to memory together: as many divide a tile's parts."""
    return 2 if block_m <= 128 and block_n > int(PART.value) else 1


def shared_bytes(block_m: int, block_n: int, width: int, stages: int) -> int:
    """The ring, what is on its way to memory, and the barriers."""
    ring = stages * (block_m + width) * int(DEPTH.value)
    return 2 * (ring + block_m * int(PART.value) * parts_at_once(block_m, block_n)) + BARRIER_BYTES


@gluon.jit
def place(tile, rows, columns, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """First row and first column of a tile. GROUP tiles of rows share their columns of weights in the L2 cache."""
    tiles_m = (rows + BLOCK_M - 1) // BLOCK_M
    in_group = GROUP * ((columns + BLOCK_N - 1) // BLOCK_N)
    first = tile // in_group * GROUP
    height = gl.minimum(tiles_m - first, GROUP)
    return (first + tile % in_group % height) * BLOCK_M, tile % in_group // height * BLOCK_N


@gluon.jit
def _gelu(x):
    """See :func:`autotune.kernels.matmul_tile.gelu_tanh`."""
    return x / (1.0 + gl.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))


@gluon.jit
def _produce(x_desc, w_desc, ring, rows, columns, depth, GEGLU: gl.constexpr, BLOCK_M: gl.constexpr,
             BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """The loading warp: every tile's steps, in the order in which the consumers take them."""
    x_smem, w_smem, full, empty = ring
    tiles = (rows + BLOCK_M - 1) // BLOCK_M * ((columns + BLOCK_N - 1) // BLOCK_N)
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = place(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        for k in range(0, depth, DEPTH):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BLOCK_M + WIDTH) * DEPTH * 2)
            tma.async_copy_global_to_shared(x_desc, [row, k], full.index(stage), x_smem.index(stage))
            if GEGLU:
                gate = w_smem.index(stage).slice(0, BLOCK_N)
                up = w_smem.index(stage).slice(BLOCK_N, BLOCK_N)
                tma.async_copy_global_to_shared(w_desc, [column, k], full.index(stage), gate)
                tma.async_copy_global_to_shared(w_desc, [columns + column, k], full.index(stage), up)
            else:
                tma.async_copy_global_to_shared(w_desc, [column, k], full.index(stage), w_smem.index(stage))
            count += 1


@gluon.jit
def _halves(x, M: gl.constexpr, N: gl.constexpr):
    """Left and right columns; registers change their names and nothing moves."""
    return gl.split(gl.permute(gl.reshape(x, [M, 2, N // 2]), (0, 2, 1)))


@gluon.jit
def _write(sum_MN, row, column, part, y_desc, y_smem, residual_ptr, rows, columns,
           FIRST: gl.constexpr, BUFFERS: gl.constexpr, M: gl.constexpr, N: gl.constexpr):  # fmt: skip
    """Writes N columns, in parts through a consumer's buffers, of which the first is ``FIRST``.

    ``part`` numbers a tile's parts; returns the number of the next.
    """
    if N > PART:
        left_MN, right_MN = _halves(sum_MN, M, N)
        part = _write(
            left_MN, row, column, part, y_desc, y_smem, residual_ptr, rows, columns, FIRST, BUFFERS, M, N // 2
        )
        part = _write(
            right_MN, row, column + N // 2, part, y_desc, y_smem, residual_ptr, rows, columns, FIRST, BUFFERS, M, N // 2
        )
    else:
        layout: gl.constexpr = sum_MN.type.layout
        if residual_ptr is not None:
            row_M = row + gl.arange(0, M, gl.SliceLayout(1, layout))
            column_N = column + gl.arange(0, N, gl.SliceLayout(0, layout))
            inside_MN = (row_M < rows)[:, None] & (column_N < columns)[None, :]
            pointer_MN = residual_ptr + row_M.to(gl.int64)[:, None] * columns + column_N[None, :]
            sum_MN += gl.load(pointer_MN, mask=inside_MN, other=0.0).to(gl.float32)
        tma.store_wait(BUFFERS - 1)
        buffer = y_smem.index(FIRST + part % BUFFERS)
        buffer.store(sum_MN.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [row, column], buffer)
        part += 1
    return part


@gluon.jit
def finish(sum_MN, row, column, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns,
            GELU: gl.constexpr, GEGLU: gl.constexpr, FIRST: gl.constexpr, BUFFERS: gl.constexpr, M: gl.constexpr,
            BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):  # fmt: skip
    """Bias, activation and residual in fp32, and one rounding."""
    if bias_ptr is not None:
        number_N = gl.arange(0, WIDTH, gl.SliceLayout(0, sum_MN.type.layout))
        column_N = column + number_N % BLOCK_N
        half_N = number_N // BLOCK_N * columns
        bias_N = gl.load(bias_ptr + half_N + column_N, mask=column_N < columns, other=0.0)
        sum_MN += bias_N.to(gl.float32)[None, :]
    if GEGLU:
        gate_MN, up_MN = _halves(sum_MN, M, WIDTH)
        sum_MN = _gelu(gate_MN) * up_MN
    elif GELU:
        sum_MN = _gelu(sum_MN)
    _write(sum_MN, row, column, 0, y_desc, y_smem, residual_ptr, rows, columns, FIRST, BUFFERS, M, BLOCK_N)


@gluon.jit
def _consume(ring, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns, depth,
             GELU: gl.constexpr, GEGLU: gl.constexpr, BUFFERS: gl.constexpr, BLOCK_M: gl.constexpr,
             BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
             WHICH: gl.constexpr):  # fmt: skip
    """A consumer: the upper or the lower half of every tile of this program."""
    M: gl.constexpr = BLOCK_M // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    x_smem, w_smem, full, empty = ring
    tiles = (rows + BLOCK_M - 1) // BLOCK_M * ((columns + BLOCK_N - 1) // BLOCK_N)
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = place(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        sum_MN = gl.zeros([M, WIDTH], gl.float32, layout)
        for k in range(0, depth, DEPTH):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            x = x_smem.index(stage).slice(WHICH * M, M)
            w = w_smem.index(stage).permute((1, 0))
            sum_MN = warpgroup_mma(x, w, sum_MN, is_async=True)
            # The step before is done: its buffers may be filled again.
            sum_MN = warpgroup_mma_wait(1, deps=(sum_MN,))
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=k > 0)
            count += 1
        sum_MN = warpgroup_mma_wait(0, deps=(sum_MN,))
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        finish(
            sum_MN, row + WHICH * M, column, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns,
            GELU, GEGLU, WHICH * BUFFERS, BUFFERS, M, BLOCK_N, WIDTH,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def barriers(LENGTH: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [LENGTH, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(LENGTH):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def descriptor(ptr, rows, columns, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """[rows, columns], in blocks of [ROWS, COLUMNS]."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], gl.bfloat16)
    return tma.make_tensor_descriptor(ptr, [rows, columns], [columns, 1], [ROWS, COLUMNS], layout)


@gluon.jit
def matmul_hopper_kernel(
    x_ptr, w_ptr, y_ptr, bias_ptr, residual_ptr, rows, columns, depth,
    GELU: gl.constexpr, GEGLU: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Every tile whose number is the program's modulo their count."""
    M: gl.constexpr = BLOCK_M // 2
    WIDTH: gl.constexpr = BLOCK_N * 2 if GEGLU else BLOCK_N
    x_desc = descriptor(x_ptr, rows, depth, BLOCK_M, DEPTH)
    w_desc = descriptor(w_ptr, columns * (WIDTH // BLOCK_N), depth, BLOCK_N, DEPTH)
    y_desc = descriptor(y_ptr, rows, columns, M, PART)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, DEPTH], gl.bfloat16)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WIDTH, DEPTH], gl.bfloat16)
    y_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, PART], gl.bfloat16)
    ring = (
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, DEPTH], x_layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, WIDTH, DEPTH], w_layout),
        barriers(STAGES, 1),
        barriers(STAGES, 2),
    )
    y_smem = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, M, PART], y_layout)
    gl.warp_specialize(
        [
            (
                _consume,
                (ring, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns, depth,
                 GELU, GEGLU, BUFFERS, BLOCK_M, BLOCK_N, WIDTH, GROUP, STAGES, 0),
            ),
            (
                _consume,
                (ring, y_desc, y_smem, bias_ptr, residual_ptr, rows, columns, depth,
                 GELU, GEGLU, BUFFERS, BLOCK_M, BLOCK_N, WIDTH, GROUP, STAGES, 1),
            ),
            (
                _produce,
                (x_desc, w_desc, ring, rows, columns, depth,
                 GEGLU, BLOCK_M, BLOCK_N, WIDTH, GROUP, STAGES),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
