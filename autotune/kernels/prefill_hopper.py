"""Both prefill attentions for Hopper, in Gluon: warps that load and warps that compute, in programs that stay.

Legend: B batch, S tokens in the chunk, N query heads, G key-value heads, D head_dim, W window, C context; a tile is
64 queries of two heads of one group, one head for each consumer; a block has K keys.

What ``window_prefill`` and ``global_prefill`` compute (:mod:`autotune.kernels.prefill_attention` has the formula), by
groups of warps. One warp loads queries and keys, another values, through tensor descriptors into rings of buffers; two
groups of four, the consumers, multiply and reduce. Each consumer issues the scores of the next block before the
weighted sum of the last, and takes the softmax while that sum is under way, so that the matrix units wait for neither.
A program keeps its descriptors and goes on to another tile while the loads for it run ahead.

Every buffer has two barriers: ``full``, completed by the bytes that arrive, and ``empty``, by the consumers that are
through with it. The n-th use of a buffer waits for parity n & 1 of ``full``, or for the parity before of ``empty``.

Source: FlashAttention-3 (arXiv 2407.08608), section 3.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

QUERIES = 64
"""Of a tile; each consumer takes those of one head."""
ROWS = gl.constexpr(QUERIES)
LOWEST = gl.constexpr(-1e30)
"""Where a running maximum starts: below every score, and finite."""
NOWHERE = gl.constexpr(-(2**30))
"""The position of what no query sees."""
REGISTERS = 168
"""65,536 over the 384 threads of a program: ptxas counts a whole warpgroup for the loading warp."""
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
"""What the two sides have once the loading warps gave theirs away."""


def shared_bytes(head_dim: int, keys: int, stages: int) -> int:
    """Queries, keys and values, 64 columns of each consumer's output on their way, and the barriers."""
    values = 2 * QUERIES * head_dim + 2 * stages * keys * head_dim + 2 * QUERIES * 64
    return 2 * values + 8 * (4 + 4 * stages + 2)


@gluon.jit
def _turn(number):
    """Which of all tiles is this program's ``number``-th: every other round runs backwards, which evens the load."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return number * programs + gl.where(number & 1 == 1, programs - 1 - place, place)


@gluon.jit
def _turns(total):
    """How many of ``total`` tiles are this program's."""
    rounds = total // gl.num_programs(0)
    return rounds + gl.where(_turn(rounds) < total, 1, 0)


@gluon.jit
def _tile(number, active, PAIRS: gl.constexpr):
    """First query and first head of a tile; the long tiles at the chunk's end come first."""
    turn = _turn(number)
    return (active - 1 - turn // PAIRS) * ROWS, turn % PAIRS * 2


@gluon.jit
def _chunk_blocks(visible_end_ptr, batch, chunk, first, start, length, WINDOW: gl.constexpr, IMAGES: gl.constexpr,
                  K: gl.constexpr):  # fmt: skip
    """First key of a tile, its blocks of keys, and how many of them, from the second on, every row sees whole.

    Keys count from the chunk's first token where there is a window, from the cache's first slot where there is none.
    """
    end = gl.minimum(first + ROWS, length)
    if IMAGES:
        end = gl.minimum(gl.load(visible_end_ptr + (batch.to(gl.int64) * chunk + end - 1)), length)
    if WINDOW > 0:
        key = gl.maximum(first - WINDOW + 1, 0) // K * K
        blocks = (end - key + K - 1) // K
        seen = (first + 1 - key) // K
        # Where the window's edge cuts more than the first block, which is always masked, all are masked.
        seen = gl.where(first + ROWS - WINDOW <= key + K, seen, 1)
    else:
        key = start * 0
        blocks = (start + end + K - 1) // K
        seen = (start + first + 1) // K
    return key, blocks, gl.maximum(seen, 1)


@gluon.jit
def _ring_blocks(first, start, WINDOW: gl.constexpr, K: gl.constexpr):
    """Of the ring of older keys: the first block of slots that a tile needs, how many, and all that hold something."""
    if WINDOW > 0:
        held = (gl.minimum(start, WINDOW) + K - 1) // K
        newest = (start + WINDOW - 1) % WINDOW
        oldest = gl.maximum(start + first - WINDOW + 1, 0) % WINDOW
        begin = oldest // K
        count = newest // K - begin + gl.where(oldest > newest, held + 1, 1)
        count = gl.where((start > 0) & (first < WINDOW - 1), gl.minimum(count, held), 0)
    else:
        held = start * 0
        begin = start * 0
        count = start * 0
    return begin, count, held


@gluon.jit
def _positions(step, key, blocks, begin, held, start, column_K, WINDOW: gl.constexpr, K: gl.constexpr):
    """Positions of the keys of a tile's block ``step``; those in the ring lie below zero."""
    position_K = key + step * K + column_K
    if WINDOW > 0:
        block = begin + step - blocks
        slot_K = gl.where(block < held, block, block - held) * K + column_K
        newest = (start + WINDOW - 1) % WINDOW
        older_K = slot_K - newest - 1 - gl.where(slot_K > newest, WINDOW, 0)
        older_K = gl.where((slot_K < WINDOW) & (older_K >= -start), older_K, NOWHERE)
        position_K = gl.where(step < blocks, position_K, older_K)
    return position_K


@gluon.jit
def _load_rows(desc, row, column, head, to, count, RING: gl.constexpr, K: gl.constexpr, D: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    """The keys or the values of one block, as soon as their buffer is free."""
    smem, full, empty = to
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), K * D * 2)
    if RING:
        block = smem.index(stage).reshape([1, K, D])
        tma.async_copy_global_to_shared(desc, [head, row, 0], full.index(stage), block)
    else:
        tma.async_copy_global_to_shared(desc, [row, column], full.index(stage), smem.index(stage))


@gluon.jit
def _produce(chunk_desc, cache_desc, to, q_desc, queries, visible_end_ptr, batch, chunk, start, length,
             HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, WINDOW: gl.constexpr, IMAGES: gl.constexpr,
             K: gl.constexpr, STAGES: gl.constexpr, QUERIES_TOO: gl.constexpr):  # fmt: skip
    """A loading warp, of keys or of values: every tile's blocks in the order in which the consumers take them."""
    q_smem, q_full, q_empty = queries
    active = (length + ROWS - 1) // ROWS
    count = 0
    for tile in range(_turns(active * (HEADS // 2))):
        first, head = _tile(tile, active, HEADS // 2)
        if QUERIES_TOO:
            for which in gl.static_range(2):
                mbarrier.wait(q_empty.index(which), (tile & 1) ^ 1)
                mbarrier.expect(q_full.index(which), ROWS * D * 2)
                column = (head + which) * D
                tma.async_copy_global_to_shared(q_desc, [first, column], q_full.index(which), q_smem.index(which))
        kv_head = head // GROUP
        key, blocks, _ = _chunk_blocks(visible_end_ptr, batch, chunk, first, start, length, WINDOW, IMAGES, K)
        if WINDOW > 0:
            for step in range(blocks):
                _load_rows(chunk_desc, key + step * K, kv_head * D, kv_head, to, count, False, K, D, STAGES)
                count += 1
            begin, blocks, held = _ring_blocks(first, start, WINDOW, K)
        else:
            begin = key
            held = blocks
        for step in range(blocks):
            block = begin + step
            slot = gl.where(block < held, block, block - held) * K
            _load_rows(cache_desc, slot, 0, kv_head, to, count, True, K, D, STAGES)
            count += 1


@gluon.jit
def _softmax(s_MK, max_M, sum_M, scale, o_layout: gl.constexpr):
    """One step of the online softmax: the weights as an operand, the new maximum and sum, and what shrinks the rest."""
    new_M = gl.maximum(max_M, gl.max(s_MK, 1) * scale)
    p_MK = gl.exp2(s_MK * scale - new_M[:, None])
    shrink_M = gl.exp2(max_M - new_M)
    sum_M = sum_M * shrink_M + gl.sum(p_MK, 1)
    p_MK = gl.convert_layout(p_MK.to(gl.bfloat16), gl.DotOperandLayout(0, o_layout, 2))
    return p_MK, new_M, sum_M, gl.convert_layout(shrink_M, gl.SliceLayout(1, o_layout))


@gluon.jit
def _masked(s_MK, position_K, low_M, end_M, WINDOW: gl.constexpr):
    s_MK = gl.where(position_K[None, :] < end_M[:, None], s_MK, float("-inf"))
    if WINDOW > 0:
        s_MK = gl.where(position_K[None, :] > low_M[:, None], s_MK, float("-inf"))
    return s_MK


@gluon.jit
def _scores(q, keys, count, STAGES: gl.constexpr, K: gl.constexpr, s_layout: gl.constexpr):
    """Issues the product of the queries and block ``count``."""
    smem, full, _ = keys
    mbarrier.wait(full.index(count % STAGES), count // STAGES & 1)
    zero_MK = gl.zeros([ROWS, K], gl.float32, s_layout)
    k = smem.index(count % STAGES).permute((1, 0))
    return warpgroup_mma(q, k, zero_MK, use_acc=False, is_async=True)


@gluon.jit
def _weighted_sum(p_MK, acc_MD, shrink_M, values, count, STAGES: gl.constexpr):
    """Issues the sum of the values of block ``count``, onto the shrunken sum of those before."""
    smem, full, _ = values
    acc_MD = acc_MD * shrink_M[:, None]
    mbarrier.wait(full.index(count % STAGES), count // STAGES & 1)
    return warpgroup_mma(p_MK, smem.index(count % STAGES), acc_MD, is_async=True)


@gluon.jit
def _step(q, keys, values, passed, count, position_K, low_M, end_M, acc_MD, p_MK, shrink_M, max_M, sum_M, scale,
          MASK: gl.constexpr, WINDOW: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
          s_layout: gl.constexpr, o_layout: gl.constexpr):  # fmt: skip
    """The scores and the softmax of block ``count`` around the weighted sum of the block before."""
    s_MK = _scores(q, keys, count, STAGES, K, s_layout)
    acc_MD = _weighted_sum(p_MK, acc_MD, shrink_M, values, count - 1, STAGES)
    s_MK = warpgroup_mma_wait(1, deps=(s_MK,))
    mbarrier.arrive(keys[2].index(count % STAGES), count=1)
    if MASK:
        s_MK = _masked(s_MK, position_K, low_M, end_M, WINDOW)
    next_MK, max_M, sum_M, shrink_M = _softmax(s_MK, max_M, sum_M, scale, o_layout)
    # ptxas moves the wait for the weighted sum above the softmax, which undoes the overlap, unless a branch stands
    # between them. Waiting for a barrier is one; this one lets everything pass.
    mbarrier.wait(passed, 1)
    acc_MD, p_MK, next_MK = warpgroup_mma_wait(0, deps=(acc_MD, p_MK, next_MK))
    mbarrier.arrive(values[2].index((count - 1) % STAGES), count=1)
    return acc_MD, next_MK, shrink_M, max_M, sum_M


@gluon.jit
def _store(out_ptr, out_MD, batch, chunk, length, first, head, column, HEADS: gl.constexpr, D: gl.constexpr,
           PART: gl.constexpr):  # fmt: skip
    """Stores ``PART`` columns of a tile's rows, 64 at a time through shared memory; padding rows are zeros."""
    if PART > 64:
        low, high = gl.split(gl.permute(gl.reshape(out_MD, [ROWS, 2, PART // 2]), (0, 2, 1)))
        _store(out_ptr, low, batch, chunk, length, first, head, column, HEADS, D, PART // 2)
        _store(out_ptr, high, batch, chunk, length, first, head, column + PART // 2, HEADS, D, PART // 2)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        query_M = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        out_MD = gl.where((query_M < length)[:, None], gl.convert_layout(out_MD, layout), 0.0)
        row_M = (batch.to(gl.int64) * chunk + query_M) * HEADS + head
        column_D = column + gl.arange(0, PART, gl.SliceLayout(0, layout))
        gl.store(out_ptr + row_M[:, None] * D + column_D[None, :], out_MD, mask=(query_M < chunk)[:, None])


@gluon.jit
def _consume(queries, keys, values, passed, visible_end_ptr, out_ptr, batch, chunk, start, length, scale,
             HEADS: gl.constexpr, D: gl.constexpr, WINDOW: gl.constexpr, IMAGES: gl.constexpr,
             K: gl.constexpr, STAGES: gl.constexpr, WHICH: gl.constexpr):  # fmt: skip
    """A consumer: one head of every tile of this program."""
    q_smem, q_full, q_empty = queries
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_M = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    column_K = gl.arange(0, K, gl.SliceLayout(0, s_layout))
    q = q_smem.index(WHICH)
    active = (length + ROWS - 1) // ROWS
    origin = start
    if WINDOW > 0:
        origin = start * 0
    count = 0
    for tile in range(_turns(active * (HEADS // 2))):
        first, head = _tile(tile, active, HEADS // 2)
        query_M = first + row_M
        end_M = query_M + 1
        if IMAGES:
            end_M = gl.load(visible_end_ptr + batch.to(gl.int64) * chunk + query_M, mask=query_M < length, other=0)
        end_M = origin + gl.minimum(end_M, length)
        low_M = query_M - WINDOW
        key, blocks, seen = _chunk_blocks(visible_end_ptr, batch, chunk, first, start, length, WINDOW, IMAGES, K)
        begin, older, held = _ring_blocks(first, start, WINDOW, K)

        mbarrier.wait(q_full.index(WHICH), tile & 1)
        s_MK = warpgroup_mma_wait(0, deps=(_scores(q, keys, count, STAGES, K, s_layout),))
        mbarrier.arrive(keys[2].index(count % STAGES), count=1)
        s_MK = _masked(s_MK, key + column_K, low_M, end_M, WINDOW)
        max_M = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, s_layout))
        sum_M = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
        p_MK, max_M, sum_M, shrink_M = _softmax(s_MK, max_M, sum_M, scale, o_layout)
        acc_MD = gl.zeros([ROWS, D], gl.float32, o_layout)
        count += 1
        for _ in range(1, seen):
            acc_MD, p_MK, shrink_M, max_M, sum_M = _step(
                q, keys, values, passed, count, column_K, low_M, end_M, acc_MD, p_MK, shrink_M, max_M, sum_M, scale,
                False, WINDOW, K, STAGES, s_layout, o_layout,
            )  # fmt: skip
            count += 1
        for step in range(seen, blocks + older):
            position_K = _positions(step, key, blocks, begin, held, start, column_K, WINDOW, K)
            acc_MD, p_MK, shrink_M, max_M, sum_M = _step(
                q, keys, values, passed, count, position_K, low_M, end_M, acc_MD, p_MK, shrink_M, max_M, sum_M, scale,
                True, WINDOW, K, STAGES, s_layout, o_layout,
            )  # fmt: skip
            count += 1
        mbarrier.arrive(q_empty.index(WHICH), count=1)
        acc_MD = _weighted_sum(p_MK, acc_MD, shrink_M, values, count - 1, STAGES)
        acc_MD, p_MK = warpgroup_mma_wait(0, deps=(acc_MD, p_MK))
        mbarrier.arrive(values[2].index((count - 1) % STAGES), count=1)
        share_M = 1.0 / gl.convert_layout(sum_M, gl.SliceLayout(1, o_layout))
        out_MD = (acc_MD * share_M[:, None]).to(gl.bfloat16)
        _store(out_ptr, out_MD, batch, chunk, length, first, head + WHICH, 0, HEADS, D, D)

    padding = (chunk + ROWS - 1) // ROWS - active
    for turn in range(gl.program_id(0), padding * (HEADS // 2), gl.num_programs(0)):
        first = (active + turn // (HEADS // 2)) * ROWS
        zero_MD = gl.zeros([ROWS, D], gl.bfloat16, o_layout)
        _store(out_ptr, zero_MD, batch, chunk, length, first, turn % (HEADS // 2) * 2 + WHICH, 0, HEADS, D, D)


@gluon.jit
def _barriers(LENGTH: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [LENGTH, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(LENGTH):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def _chunk_descriptor(ptr, rows, WIDTH: gl.constexpr, K: gl.constexpr, D: gl.constexpr):
    """[rows, heads x D], read as K rows of one head."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([K, D], gl.bfloat16)
    return tma.make_tensor_descriptor(ptr, [rows, WIDTH], [WIDTH, 1], [K, D], layout)


@gluon.jit
def _cache_descriptor(ptr, rows, slots, KV_HEADS: gl.constexpr, K: gl.constexpr, D: gl.constexpr):
    """[G, rows, D] of a cache of more slots, read as K rows of one head."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, K, D], gl.bfloat16)
    return tma.make_tensor_descriptor(ptr, [KV_HEADS, rows, D], [slots * D, D, 1], [1, K, D], layout)


@gluon.jit
def prefill_hopper_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, start_ptr, length_ptr, visible_end_ptr, out_ptr, chunk, slots, scale,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, WINDOW: gl.constexpr, IMAGES: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    batch = gl.program_id(1)
    start = gl.load(start_ptr + batch)
    length = gl.load(length_ptr + batch)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], gl.bfloat16)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], gl.bfloat16)
    wide: gl.constexpr = HEADS * HEAD_DIM
    narrow: gl.constexpr = KV_HEADS * HEAD_DIM

    # The bounds of the descriptors end at what holds something: the rest reads as zeros.
    first_row = batch.to(gl.int64) * chunk
    rows = gl.maximum(length, 1)
    q_desc = _chunk_descriptor(q_ptr + first_row * wide, rows, wide, ROWS, HEAD_DIM)
    held = start + rows
    if WINDOW > 0:
        held = gl.maximum(gl.minimum(start, WINDOW), 1)
    offset = batch.to(gl.int64) * slots * narrow
    cache_k_desc = _cache_descriptor(k_cache_ptr + offset, held, slots, KV_HEADS, BLOCK_N, HEAD_DIM)
    cache_v_desc = _cache_descriptor(v_cache_ptr + offset, held, slots, KV_HEADS, BLOCK_N, HEAD_DIM)
    chunk_k_desc = cache_k_desc
    chunk_v_desc = cache_v_desc
    if WINDOW > 0:
        chunk_k_desc = _chunk_descriptor(k_ptr + first_row * narrow, rows, narrow, BLOCK_N, HEAD_DIM)
        chunk_v_desc = _chunk_descriptor(v_ptr + first_row * narrow, rows, narrow, BLOCK_N, HEAD_DIM)

    queries = (
        gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, HEAD_DIM], q_layout),
        _barriers(2, 1),
        _barriers(2, 1),
    )
    keys = (
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, HEAD_DIM], layout),
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),
    )
    values = (
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, HEAD_DIM], layout),
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),
    )
    passed = _barriers(1, 1).index(0)
    gl.warp_specialize(
        [
            (
                _consume,
                (queries, keys, values, passed, visible_end_ptr, out_ptr, batch, chunk, start, length, scale,
                 HEADS, HEAD_DIM, WINDOW, IMAGES, BLOCK_N, STAGES, 0),
            ),
            (
                _consume,
                (queries, keys, values, passed, visible_end_ptr, out_ptr, batch, chunk, start, length, scale,
                 HEADS, HEAD_DIM, WINDOW, IMAGES, BLOCK_N, STAGES, 1),
            ),
            (
                _produce,
                (chunk_k_desc, cache_k_desc, keys, q_desc, queries, visible_end_ptr, batch, chunk, start, length,
                 HEADS, HEADS // KV_HEADS, HEAD_DIM, WINDOW, IMAGES, BLOCK_N, STAGES, True),
            ),
            (
                _produce,
                (chunk_v_desc, cache_v_desc, values, q_desc, queries, visible_end_ptr, batch, chunk, start, length,
                 HEADS, HEADS // KV_HEADS, HEAD_DIM, WINDOW, IMAGES, BLOCK_N, STAGES, False),
            ),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
