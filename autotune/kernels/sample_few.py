"""What one program does alone for a row of :mod:`autotune.kernels.sample`: its largest logit, or a draw of the k largest.

Legend: V vocabulary, g groups of neighbouring logits, E tokens at a time, P keys. Pointers are to the program's own row.
A barrier stands wherever a program reads back what its threads have written. Everything here is inlined.
"""

from __future__ import annotations

import triton
import triton.language as tl

from autotune.kernels.sample_order import (
    COMPARED,
    HIGHEST,
    ID_BITS,
    compared,
    covering,
    depth_of,
    drawn_place,
    key_of,
    last_of_nucleus,
    least_weight,
    load_logits,
    put_in_scratch,
    token_at,
    weight_of,
)


@triton.jit
def first_of_largest(
    logits_ptr, seen_ptr, penalty, maxima_ptr, vocab, groups, top, GROUP: tl.constexpr, CHUNK: tl.constexpr
):
    """The lowest id among the largest logits."""
    first_E = tl.full([CHUNK], HIGHEST, tl.int32)
    for begin in range(0, groups, CHUNK):
        group_E = begin + tl.arange(0, CHUNK)
        x_E = tl.load(maxima_ptr + group_E, group_E < groups, other=float("-inf"))
        first_E = tl.minimum(first_E, tl.where(x_E == top, group_E, HIGHEST))
    id_E = tl.min(first_E, 0) * GROUP + tl.arange(0, GROUP)
    x_E = load_logits(logits_ptr, seen_ptr, penalty, id_E, id_E < vocab)
    return tl.min(tl.where(x_E == top, id_E, HIGHEST), 0)


@triton.jit
def _bound(maxima_ptr, groups, least, top, top_k, PIVOTS: tl.constexpr, CHUNK: tl.constexpr):
    """A key that ``top_k`` of the groups' maxima reach, and few more; the k-th largest logit lies no lower."""
    lowest = key_of(least).to(tl.int64)
    above = key_of(top).to(tl.int64) + 1
    reached = tl.zeros((), tl.int32) + groups
    while (above - lowest > 1) & (reached > top_k + top_k // 4):
        step = (above - lowest + PIVOTS) // (PIVOTS + 1)
        key_P = tl.minimum(lowest + (tl.arange(0, PIVOTS) + 1) * step, above).to(tl.int32)
        number_P = tl.zeros([PIVOTS], tl.int32)
        for begin in range(0, groups, CHUNK):
            group_E = begin + tl.arange(0, CHUNK)
            x_E = tl.load(maxima_ptr + group_E, group_E < groups, other=float("-inf"))
            number_P += tl.sum((key_of(x_E)[None, :] >= key_P[:, None]).to(tl.int32), 1)
        enough_P = number_P >= top_k
        reached = tl.minimum(reached, tl.min(tl.where(enough_P, number_P, HIGHEST), 0))
        lowest += tl.sum(enough_P.to(tl.int64), 0) * step
        above = tl.minimum(above, lowest + step)
    return lowest.to(tl.int32)


@triton.jit
def _gather(
    logits_ptr, seen_ptr, penalty, maxima_ptr, listed_ptr, values_ptr, ids_ptr, vocab, groups, bound,
    GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the logits from key ``bound`` upwards, and their ids; returns how many there are."""
    listed = tl.zeros((), tl.int32)
    for begin in range(0, groups, CHUNK):
        group_E = begin + tl.arange(0, CHUNK)
        x_E = tl.load(maxima_ptr + group_E, group_E < groups, other=float("-inf"))
        take_E = (group_E < groups) & (key_of(x_E) >= bound)
        place_E = listed + tl.cumsum(take_E.to(tl.int32), 0) - 1
        tl.store(listed_ptr + place_E, group_E, take_E)
        listed += tl.sum(take_E.to(tl.int32), 0)
    tl.debug_barrier()
    count = tl.zeros((), tl.int32)
    for begin in range(0, listed, CHUNK // GROUP):
        which_g = begin + tl.arange(0, CHUNK // GROUP)
        group_g = tl.load(listed_ptr + which_g, which_g < listed, other=0)
        id_E = tl.reshape(group_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [CHUNK])
        inside_E = (begin + tl.arange(0, CHUNK) // GROUP < listed) & (id_E < vocab)
        x_E = load_logits(logits_ptr, seen_ptr, penalty, id_E, inside_E)
        take_E = inside_E & (key_of(x_E) >= bound)
        place_E = count + tl.cumsum(take_E.to(tl.int32), 0) - 1
        tl.store(values_ptr + place_E, x_E, take_E)
        tl.store(ids_ptr + place_E, id_E, take_E)
        count += tl.sum(take_E.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def _masses_from(values_ptr, count, least, smallest_weight, top, rate, SEARCH: tl.constexpr):
    """Of a list's tokens from key ``least`` upwards the mass, and the mass of those that min-p leaves."""
    all_E = tl.zeros([SEARCH], tl.int64)
    likely_E = tl.zeros([SEARCH], tl.int64)
    for begin in range(0, count, SEARCH):
        place_E = begin + tl.arange(0, SEARCH)
        x_E = tl.load(values_ptr + place_E, place_E < count, other=float("-inf"))
        weight_E = tl.where(key_of(x_E) >= least, weight_of(x_E, top, rate), 0)
        all_E += weight_E
        likely_E += tl.where(weight_E >= smallest_weight, weight_E, 0)
    return tl.sum(all_E, 0), tl.sum(likely_E, 0)


@triton.jit
def _draw_at_once(
    values_ptr, ids_ptr, scratch_ptr, count, top, rate, top_k, top_p, min_p, uniform, SEARCH: tl.constexpr
):
    """The order of the token that is drawn of a list of up to ``SEARCH``: what :func:`_draw_in_steps` finds."""
    put_in_scratch(values_ptr, ids_ptr, scratch_ptr, count, False, True, top, rate, SEARCH)
    tl.debug_barrier()
    order_E, weight_E, before_E, larger_E = compared(scratch_ptr, count, SEARCH, COMPARED)
    weight_E = tl.where(larger_E < top_k, weight_E, 0)
    likely = tl.sum(tl.where(weight_E >= least_weight(min_p), weight_E, 0), 0)
    _, end = covering(order_E, weight_E, before_E, last_of_nucleus(top_p, tl.sum(weight_E, 0)))
    order, _ = covering(order_E, weight_E, before_E, drawn_place(uniform, tl.minimum(end, likely)))
    return order


@triton.jit
def _draw_in_steps(
    values_ptr, ids_ptr, scratch_ptr, count, bound, top, rate, top_k, top_p, min_p, uniform, vocab,
    PIVOTS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """The order of the token that is drawn of a list of any length.

    Three searches: for the k-th largest, which says what the mass is; for the last of top-p; for the token.
    """
    low = depth_of(top) << ID_BITS
    high = (0x7FFFFFFF - bound.to(tl.int64) + 1) << ID_BITS
    base = tl.zeros((), tl.int64)
    kept = tl.zeros((), tl.int64)
    likely = tl.zeros((), tl.int64)
    order = tl.zeros((), tl.int64)
    for search in range(3):
        place = tl.where(search == 1, last_of_nucleus(top_p, kept), drawn_place(uniform, kept))
        place = tl.where(search == 0, top_k.to(tl.int64) - 1, place)
        order, end = token_at(
            values_ptr, ids_ptr, scratch_ptr, count, low, high, base, place, False, search > 0, top, rate, vocab,
            PIVOTS, SEARCH,
        )  # fmt: skip
        if search == 0:
            last = (0x7FFFFFFF - (order >> ID_BITS)).to(tl.int32)
            kept, likely = _masses_from(values_ptr, count, last, least_weight(min_p), top, rate, 4 * SEARCH)
        else:
            kept = tl.minimum(end, likely)
    return order


@triton.jit
def token_of_few(
    logits_ptr, seen_ptr, penalty, maxima_ptr, listed_ptr, values_ptr, ids_ptr, scratch_ptr, vocab, groups,
    top, least, rate, top_k, top_p, min_p, uniform,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, SEARCH: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The token that is drawn of the k largest logits, and ties with the last of them.

    They are among what reaches the k-th largest of the groups' maxima.
    """
    bound = key_of(least)
    if top_k <= groups:
        bound = _bound(maxima_ptr, groups, least, top, top_k, PIVOTS // 4, CHUNK)
    count = _gather(
        logits_ptr, seen_ptr, penalty, maxima_ptr, listed_ptr, values_ptr, ids_ptr, vocab, groups, bound, GROUP, CHUNK
    )
    if count <= SEARCH:
        order = _draw_at_once(values_ptr, ids_ptr, scratch_ptr, count, top, rate, top_k, top_p, min_p, uniform, SEARCH)
    else:
        order = _draw_in_steps(
            values_ptr, ids_ptr, scratch_ptr, count, bound, top, rate, top_k, top_p, min_p, uniform, vocab,
            PIVOTS, SEARCH,
        )  # fmt: skip
    return (order & HIGHEST).to(tl.int32)
