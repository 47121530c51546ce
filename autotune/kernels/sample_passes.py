"""The Triton functions of :mod:`autotune.kernels.sample`, which says in what order they run.

Legend: B rows, V vocabulary, g groups of neighbouring logits, E tokens at a time, P borders; masses, orders and borders
are those of :mod:`autotune.kernels.sample_order`. Pointers are to the program's own row. A barrier stands wherever a
program reads back what its threads have written.

``state`` holds int64 for each row, in lines of 16: the plan (0: the token is known; 1: draw in the order of ids; 2: of
logits), the key of the largest logit, and the order that the row begins and ends at; for each search (0: the last token of
top-p, 1: the draw) the part of the order that is left, the mass before it and the place looked for; what top-p keeps.
``borders`` holds those of the whole row and of both searches: no launch computes those of another, which a compiler might
round otherwise. ``sums`` holds what the launches add up, 4 P + 32 int64 for each row, zero before the first launch and
after the last: the masses before those borders, then that of the row and of what min-p leaves, then in lines of 16 how many
tokens each search lists. What one launch changes and what it reads lie in lines of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from autotune.kernels.dependent import release, wait
from autotune.kernels.sample_few import first_of_largest, token_of_few
from autotune.kernels.sample_order import (
    HIGHEST,
    ID_BITS,
    NOTHING,
    borders,
    depth_of,
    drawn_place,
    key_of,
    last_of_nucleus,
    least_weight,
    load_logits,
    narrowed,
    order_of,
    rate_of,
    token_at,
    value_of,
    weight_of,
)

PLAN = tl.constexpr(0)
TOP = tl.constexpr(1)
LOW = tl.constexpr(2)
HIGH = tl.constexpr(3)
LINE = tl.constexpr(16)
"""int64 in 128 bytes. The lines of the searches follow the first."""
KEPT = tl.constexpr(48)
STATE = 64
"""Words of a row."""


@triton.jit
def reduce_kernel(
    logits_ptr, seen_ptr, penalty_ptr, maxima_ptr, tops_ptr, bottoms_ptr, vocab, groups,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The largest logit of each group; the largest and the smallest of each program, NaN where it has a NaN or an infinity."""
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    group_g = tl.program_id(0) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    id_gE = group_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if seen_ptr is not None:
        seen_ptr += row * vocab
    inside_gE = id_gE < vocab
    x_gE = load_logits(logits_ptr + row * vocab, seen_ptr, tl.load(penalty_ptr + row), id_gE, inside_gE)
    broken_gE = inside_gE & ~(tl.abs(x_gE) < float("inf"))
    top_g = tl.max(tl.where(broken_gE, 0.0, x_gE), 1)
    bottom_g = tl.min(tl.where(inside_gE & ~broken_gE, x_gE, float("inf")), 1)
    broken = tl.max(tl.max(broken_gE.to(tl.int32), 1), 0) > 0
    tl.store(maxima_ptr + row * groups + group_g, top_g, group_g < groups)
    block = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(tops_ptr + block, tl.where(broken, float("nan"), tl.max(top_g, 0)))
    tl.store(bottoms_ptr + block, tl.min(bottom_g, 0))


@triton.jit
def _extremes(tops_ptr, bottoms_ptr, blocks, SEARCH: tl.constexpr):
    """The largest logit, the smallest, and whether one is NaN or infinite."""
    top_E = tl.full([SEARCH], float("-inf"), tl.float32)
    least_E = tl.full([SEARCH], float("inf"), tl.float32)
    broken_E = tl.zeros([SEARCH], tl.int32)
    for begin in range(0, blocks, SEARCH):
        block_E = begin + tl.arange(0, SEARCH)
        x_E = tl.load(tops_ptr + block_E, block_E < blocks, other=float("-inf"))
        least_E = tl.minimum(least_E, tl.load(bottoms_ptr + block_E, block_E < blocks, other=float("inf")))
        broken_E |= (x_E != x_E).to(tl.int32)
        top_E = tl.maximum(top_E, x_E)
    return tl.max(top_E, 0), tl.min(least_E, 0), tl.max(broken_E, 0)


@triton.jit
def _put(token_ptr, seen_ptr, row, token):
    """Stores the token and marks it as seen."""
    tl.store(token_ptr + row, token)
    if seen_ptr is not None:
        tl.debug_barrier()  # every warp has read what this changes
        tl.store(seen_ptr + token, 1, token >= 0)


@triton.jit
def _masses_before(
    logits_ptr, seen_ptr, penalty, vocab, border_P, low, high, by_id, smallest_weight, top, rate,
    BLOCK: tl.constexpr, SEARCH: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The mass of the program's own tokens from ``low`` up to each border, that up to ``high``, and that min-p leaves of it."""
    mass_PE = tl.zeros([PIVOTS, SEARCH], tl.int64)
    all_E = tl.zeros([SEARCH], tl.int64)
    likely_E = tl.zeros([SEARCH], tl.int64)
    for begin in tl.static_range(0, BLOCK, SEARCH):
        id_E = tl.program_id(0) * BLOCK + begin + tl.arange(0, SEARCH)
        x_E = load_logits(logits_ptr, seen_ptr, penalty, id_E, id_E < vocab)
        order_E = order_of(x_E, id_E, by_id)
        weight_E = tl.where((order_E >= low) & (order_E < high), weight_of(x_E, top, rate), 0)
        mass_PE += tl.where(order_E[None, :] < border_P[:, None], weight_E[None, :], 0)
        all_E += weight_E
        likely_E += tl.where(weight_E >= smallest_weight, weight_E, 0)
    return tl.sum(mass_PE, 1), tl.sum(all_E, 0), tl.sum(likely_E, 0)


@triton.jit
def first_kernel(
    logits_ptr, seen_ptr, temperature_ptr, penalty_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr,
    maxima_ptr, tops_ptr, bottoms_ptr, listed_ptr, values_ptr, ids_ptr, scratch_ptr, state_ptr, borders_ptr, sums_ptr,
    token_ptr, vocab, groups,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SEARCH: tl.constexpr, PIVOTS: tl.constexpr,
    STATE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The token of a row that is greedy, broken, or limited by top-k, by the row's first program. Of any other row, the
    masses before borders over its whole order.
    """
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    limited = (top_k > 0) & (top_k < vocab)
    alone = (temperature <= 0) | limited
    if alone & (tl.program_id(0) > 0):
        return
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    penalty = tl.load(penalty_ptr + row)
    rate = rate_of(temperature)
    logits_ptr += row * vocab
    maxima_ptr += row * groups
    state_ptr += row * STATE
    if seen_ptr is not None:
        seen_ptr += row * vocab
    block = row * tl.num_programs(0)
    top, least, broken = _extremes(tops_ptr + block, bottoms_ptr + block, tl.num_programs(0), SEARCH)
    by_id = (top_p >= 1) & (min_p <= 0)
    if (broken > 0) | alone:
        token = tl.full((), -1, tl.int32)
        if (broken == 0) & (temperature <= 0):
            token = first_of_largest(logits_ptr, seen_ptr, penalty, maxima_ptr, vocab, groups, top, GROUP, CHUNK)
        elif broken == 0:
            token = token_of_few(
                logits_ptr, seen_ptr, penalty, maxima_ptr, listed_ptr + row * groups, values_ptr + row * vocab,
                ids_ptr + row * vocab, scratch_ptr + row * 2 * SEARCH, vocab, groups, top, least, rate,
                top_k, top_p, min_p, tl.load(uniform_ptr + row), GROUP, CHUNK, SEARCH, PIVOTS,
            )  # fmt: skip
        if tl.program_id(0) == 0:
            tl.store(state_ptr + PLAN, 0)
            _put(token_ptr, seen_ptr, row, token)
    else:
        # What lies deeper weighs nothing.
        deepest = depth_of(tl.maximum(least, top - NOTHING / rate))
        low = tl.where(by_id, 0, depth_of(top) << ID_BITS)
        high = tl.where(by_id, tl.zeros((), tl.int64) + vocab, (deepest + 1) << ID_BITS)
        border_P = borders(low, high, vocab, PIVOTS, True)
        mass_P, mass, likely = _masses_before(
            logits_ptr, seen_ptr, penalty, vocab, border_P, low, high, by_id, least_weight(min_p), top, rate,
            BLOCK, SEARCH, PIVOTS,
        )  # fmt: skip
        sums_ptr += row * (4 * PIVOTS + 2 * LINE)
        tl.atomic_add(sums_ptr + tl.arange(0, PIVOTS), mass_P, sem="relaxed")
        tl.atomic_add(sums_ptr + 3 * PIVOTS, mass, sem="relaxed")
        tl.atomic_add(sums_ptr + 3 * PIVOTS + 1, likely, sem="relaxed")
        if tl.program_id(0) == 0:
            tl.store(state_ptr + PLAN, tl.where(by_id, 1, 2))
            tl.store(state_ptr + TOP, key_of(top).to(tl.int64))
            tl.store(state_ptr + LOW, low)
            tl.store(state_ptr + HIGH, high)
            tl.store(borders_ptr + row * 3 * PIVOTS + tl.arange(0, PIVOTS), border_P)


@triton.jit
def narrow_kernel(
    logits_ptr, seen_ptr, temperature_ptr, penalty_ptr, top_p_ptr, uniform_ptr, state_ptr, borders_ptr, sums_ptr,
    vocab,
    BLOCK: tl.constexpr, SEARCH: tl.constexpr, PIVOTS: tl.constexpr, STATE: tl.constexpr, WHICH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Begins a search: the part between two borders of the whole order that holds the place, and the masses before
    borders within it.
    """
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    state_ptr += row * STATE
    plan = tl.load(state_ptr + PLAN)
    top_p = tl.load(top_p_ptr + row)
    if (plan == 0) | ((WHICH == 0) & (top_p >= 1)):
        return
    sums_ptr += row * (4 * PIVOTS + 2 * LINE)
    kept = tl.load(sums_ptr + 3 * PIVOTS)
    if WHICH == 0:
        place = last_of_nucleus(top_p, kept)
    else:
        if top_p < 1:
            kept = tl.load(state_ptr + KEPT)
        place = drawn_place(tl.load(uniform_ptr + row), tl.minimum(kept, tl.load(sums_ptr + 3 * PIVOTS + 1)))
    low = tl.load(state_ptr + LOW)
    high = tl.load(state_ptr + HIGH)
    borders_ptr += row * 3 * PIVOTS + tl.arange(0, PIVOTS)
    border_P = tl.load(borders_ptr)
    mass_P = tl.load(sums_ptr + tl.arange(0, PIVOTS))
    low, high, base = narrowed(border_P, mass_P, place, low, high, tl.zeros((), tl.int64))
    if seen_ptr is not None:
        seen_ptr += row * vocab
    top = value_of(tl.load(state_ptr + TOP).to(tl.int32))
    border_P = borders(low, high, vocab, PIVOTS, True)
    mass_P, _, _ = _masses_before(
        logits_ptr + row * vocab, seen_ptr, tl.load(penalty_ptr + row), vocab, border_P, low, high, plan == 1, 0, top, rate_of(tl.load(temperature_ptr + row)), BLOCK, SEARCH, PIVOTS,
    )  # fmt: skip
    tl.atomic_add(sums_ptr + (WHICH + 1) * PIVOTS + tl.arange(0, PIVOTS), mass_P, sem="relaxed")
    if tl.program_id(0) == 0:
        tl.store(borders_ptr + (WHICH + 1) * PIVOTS, border_P)
        state_ptr += LINE * (WHICH + 1)
        tl.store(state_ptr, low)
        tl.store(state_ptr + 1, high)
        tl.store(state_ptr + 2, base)
        tl.store(state_ptr + 3, place)


@triton.jit
def _left(state_ptr, borders_ptr, sums_ptr, PIVOTS: tl.constexpr, WHICH: tl.constexpr):
    """What a search has left once its own masses are known: the part of the order, and the mass before it."""
    state_ptr += LINE * (WHICH + 1)
    low = tl.load(state_ptr)
    high = tl.load(state_ptr + 1)
    at_P = (WHICH + 1) * PIVOTS + tl.arange(0, PIVOTS)
    border_P = tl.load(borders_ptr + at_P)
    mass_P = tl.load(sums_ptr + at_P)
    return narrowed(border_P, mass_P, tl.load(state_ptr + 3), low, high, tl.load(state_ptr + 2))


@triton.jit
def list_kernel(
    logits_ptr, seen_ptr, penalty_ptr, top_p_ptr, state_ptr, borders_ptr, sums_ptr, values_ptr, ids_ptr, vocab,
    BLOCK: tl.constexpr, PIVOTS: tl.constexpr, STATE: tl.constexpr, WHICH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Narrows a search once more, and lists what is left, each program its own tokens wherever there is room."""
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    state_ptr += row * STATE
    plan = tl.load(state_ptr + PLAN)
    if (plan == 0) | ((WHICH == 0) & (tl.load(top_p_ptr + row) >= 1)):
        return
    sums_ptr += row * (4 * PIVOTS + 2 * LINE)
    low, high, _ = _left(state_ptr, borders_ptr + row * 3 * PIVOTS, sums_ptr, PIVOTS, WHICH)
    if seen_ptr is not None:
        seen_ptr += row * vocab
    id_E = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_E = load_logits(logits_ptr + row * vocab, seen_ptr, tl.load(penalty_ptr + row), id_E, id_E < vocab)
    order_E = order_of(x_E, id_E, plan == 1)
    take_E = (id_E < vocab) & (order_E >= low) & (order_E < high)
    number = tl.sum(take_E.to(tl.int32), 0)
    if number > 0:
        listed_ptr = sums_ptr + 4 * PIVOTS + LINE * WHICH
        begin = tl.atomic_add(listed_ptr, number.to(tl.int64), sem="relaxed")
        place_E = row * vocab + begin + tl.cumsum(take_E.to(tl.int32), 0) - 1
        tl.store(values_ptr + place_E, x_E, take_E)
        tl.store(ids_ptr + place_E, id_E, take_E)


@triton.jit
def find_kernel(
    seen_ptr, temperature_ptr, top_p_ptr, state_ptr, borders_ptr, sums_ptr, values_ptr, ids_ptr, scratch_ptr,
    token_ptr, vocab,
    SEARCH: tl.constexpr, PIVOTS: tl.constexpr, WIDE: tl.constexpr, STATE: tl.constexpr, WHICH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Ends a search, by one program a row; the second gives the token, and zeros what has to be zero."""
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    state_ptr += row * STATE
    plan = tl.load(state_ptr + PLAN)
    if (plan == 0) | ((WHICH == 0) & (tl.load(top_p_ptr + row) >= 1)):
        return
    sums_ptr += row * (4 * PIVOTS + 2 * LINE)
    low, high, base = _left(state_ptr, borders_ptr + row * 3 * PIVOTS, sums_ptr, PIVOTS, WHICH)
    order, end = token_at(
        values_ptr + row * vocab, ids_ptr + row * vocab, scratch_ptr + row * 2 * SEARCH,
        tl.load(sums_ptr + 4 * PIVOTS + LINE * WHICH).to(tl.int32), low, high, base, tl.load(state_ptr + LINE * (WHICH + 1) + 3), plan == 1, True,
        value_of(tl.load(state_ptr + TOP).to(tl.int32)), rate_of(tl.load(temperature_ptr + row)), vocab, PIVOTS, SEARCH,
    )  # fmt: skip
    if WHICH == 0:
        tl.store(state_ptr + KEPT, end)
    else:
        if seen_ptr is not None:
            seen_ptr += row * vocab
        _put(token_ptr, seen_ptr, row, (order & HIGHEST).to(tl.int32))
        tl.debug_barrier()
        word_E = tl.arange(0, WIDE)
        tl.store(sums_ptr + word_E, tl.zeros([WIDE], tl.int64), word_E < 4 * PIVOTS + 2 * LINE)
