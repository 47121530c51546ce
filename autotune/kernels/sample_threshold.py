"""The Triton functions of :mod:`autotune.kernels.sample`, which says what they compute.

Legend: g groups of neighbouring logits, E elements at a time, P pivots. Pointers are to the program's own row.
Everything here but the two kernels is inlined into them.

``rate`` is log2(e) / temperature. A ``key`` is an int32 that orders as floats do. Masses (sums of weights) and counts
add up in fp64. A barrier stands wherever a program reads back what its threads have written.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_logits(logits_ptr, seen_ptr, penalty, id_E, inside_E):
    """Logits, penalised where the token was seen; -inf outside."""
    x_E = tl.load(logits_ptr + id_E, inside_E, other=float("-inf"))
    if seen_ptr is not None:
        seen_E = tl.load(seen_ptr + id_E, inside_E, other=0) != 0
        x_E = tl.where(seen_E, tl.where(x_E < 0, x_E * penalty, tl.div_rn(x_E, penalty)), x_E)
    return x_E


@triton.jit
def _key(x):
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are one
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, top, rate):
    """exp((x - top) / temperature)"""
    return tl.exp2((x - top) * rate)


@triton.jit
def reduce_groups_kernel(
    logits_ptr, seen_ptr, temperature_ptr, penalty_ptr, maxima_ptr, sums_ptr, vocab, groups,
    GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Each group's largest logit, NaN where the group holds a NaN or an infinity, and its sum of weights beside that."""
    row = tl.program_id(1).to(tl.int64)
    group_g = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    id_gE = group_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    temperature = tl.load(temperature_ptr + row)
    rate = LOG2_E / tl.where(temperature > 0, temperature, 1.0)
    penalty = tl.load(penalty_ptr + row)
    if seen_ptr is not None:
        seen_ptr += row * vocab
    x_gE = _load_logits(logits_ptr + row * vocab, seen_ptr, penalty, id_gE, id_gE < vocab)
    broken_gE = (id_gE < vocab) & ~(tl.abs(x_gE) < float("inf"))
    top_g = tl.where(group_g < groups, tl.max(x_gE, 1), 0.0)
    sum_g = tl.sum(_weight(x_gE, top_g[:, None], rate), 1)
    top_g = tl.where(tl.max(broken_gE.to(tl.int32), 1) > 0, float("nan"), top_g)
    tl.store(maxima_ptr + row * groups + group_g, top_g, group_g < groups)
    tl.store(sums_ptr + row * groups + group_g, sum_g, group_g < groups)


@triton.jit
def _extremes(maxima_ptr, groups, CHUNK: tl.constexpr):
    """The largest and the smallest of the groups' maxima, and whether one of them is NaN."""
    top_E = tl.full([CHUNK], float("-inf"), tl.float32)
    low_E = tl.full([CHUNK], float("inf"), tl.float32)
    broken_E = tl.zeros([CHUNK], tl.int32)
    for begin in range(0, groups, CHUNK):
        group_E = begin + tl.arange(0, CHUNK)
        top_E = tl.maximum(top_E, tl.load(maxima_ptr + group_E, group_E < groups, other=float("-inf")))
        x_E = tl.load(maxima_ptr + group_E, group_E < groups, other=float("inf"))
        low_E = tl.minimum(low_E, x_E)
        broken_E |= (x_E != x_E).to(tl.int32)
    return tl.max(top_E, 0), tl.min(low_E, 0), tl.max(broken_E, 0)


@triton.jit
def _first_of_largest(
    logits_ptr, seen_ptr, penalty, maxima_ptr, vocab, groups, top, GROUP: tl.constexpr, CHUNK: tl.constexpr
):
    """The lowest id among the largest logits."""
    first_E = tl.full([CHUNK], HIGHEST, tl.int32)
    for begin in range(0, groups, CHUNK):
        group_E = begin + tl.arange(0, CHUNK)
        x_E = tl.load(maxima_ptr + group_E, group_E < groups, other=float("-inf"))
        first_E = tl.minimum(first_E, tl.where(x_E == top, group_E, HIGHEST))
    id_E = tl.min(first_E, 0) * GROUP + tl.arange(0, GROUP)
    x_E = _load_logits(logits_ptr, seen_ptr, penalty, id_E, id_E < vocab)
    return tl.min(tl.where(x_E == top, id_E, HIGHEST), 0)


@triton.jit
def _mass_of_groups(maxima_ptr, sums_ptr, groups, begin, top, rate, CHUNK: tl.constexpr):
    group_E = begin + tl.arange(0, CHUNK)
    x_E = tl.load(maxima_ptr + group_E, group_E < groups, other=float("-inf"))
    sum_E = tl.load(sums_ptr + group_E, group_E < groups, other=0.0)
    return (sum_E * _weight(x_E, top, rate)).to(tl.float64)


@triton.jit
def _total_mass(maxima_ptr, sums_ptr, groups, top, rate, CHUNK: tl.constexpr):
    total_E = tl.zeros([CHUNK], tl.float64)
    for begin in range(0, groups, CHUNK):
        total_E += _mass_of_groups(maxima_ptr, sums_ptr, groups, begin, top, rate, CHUNK)
    return tl.sum(total_E, 0)


@triton.jit
def _draw_by_id(
    logits_ptr, seen_ptr, penalty, maxima_ptr, sums_ptr, vocab, groups, top, rate, target,
    GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The first token, in order of ids, where the running sum of all weights passes ``target``."""
    passed_groups = tl.zeros((), tl.int32)
    passed_mass = tl.zeros((), tl.float64)
    before = tl.zeros((), tl.float64)
    for begin in range(0, groups, CHUNK):
        mass_E = _mass_of_groups(maxima_ptr, sums_ptr, groups, begin, top, rate, CHUNK)
        passed_E = (before + tl.cumsum(mass_E, 0) <= target) & (begin + tl.arange(0, CHUNK) < groups)
        passed_groups += tl.sum(passed_E.to(tl.int32), 0)
        passed_mass += tl.sum(tl.where(passed_E, mass_E, 0.0), 0)
        before += tl.sum(mass_E, 0)
    first = tl.minimum(passed_groups, groups - 1) * GROUP
    offset_E = tl.arange(0, GROUP)
    x_E = _load_logits(logits_ptr, seen_ptr, penalty, first + offset_E, first + offset_E < vocab)
    weight_E = _weight(x_E, top, rate)
    passed_E = passed_mass + tl.cumsum(weight_E.to(tl.float64), 0) <= target
    last = tl.max(tl.where(weight_E > 0, offset_E, 0), 0)
    return first + tl.minimum(tl.sum(passed_E.to(tl.int32), 0), last)


@triton.jit
def _threshold(
    values_ptr, count, lowest, above, needed, enough, top, rate,
    WEIGHTED: tl.constexpr, PIVOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The largest key such that the values from it upwards have more mass, or number more, than ``needed``.

    It lies in [``lowest``, ``above``), and is ``lowest`` where none does. The search may stop at a lower key once what
    lies from there upwards comes to ``enough`` or less.
    """
    lowest = lowest.to(tl.int64)
    above = above.to(tl.int64)
    reached = tl.full((), float("inf"), tl.float64)
    while (above - lowest > 1) & (reached > enough):
        step = (above - lowest + PIVOTS) // (PIVOTS + 1)
        key_P = (lowest + (tl.arange(0, PIVOTS) + 1) * step).to(tl.int32)
        sum_P = tl.zeros([PIVOTS], tl.float64)
        for begin in range(0, count, CHUNK):
            place_E = begin + tl.arange(0, CHUNK)
            x_E = tl.load(values_ptr + place_E, place_E < count, other=float("-inf"))
            if WEIGHTED:
                amount_E = _weight(x_E, top, rate)
            else:
                amount_E = (place_E < count).to(tl.float32)
            from_PE = _key(x_E)[None, :] >= key_P[:, None]
            sum_P += tl.sum(tl.where(from_PE, amount_E[None, :], 0.0), 1).to(tl.float64)
        reached = tl.minimum(reached, tl.min(tl.where(sum_P > needed, sum_P, float("inf")), 0))
        lowest += tl.sum((sum_P > needed).to(tl.int64), 0) * step
        above = tl.minimum(above, lowest + step)
    return lowest.to(tl.int32)


@triton.jit
def _gather(
    logits_ptr, seen_ptr, penalty, maxima_ptr, listed_ptr, values_ptr, ids_ptr, vocab, groups,
    bound, floor, top, rate, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the logits from key ``bound`` and from weight ``floor`` upwards, and their ids, ascending.

    Returns:
        how many there are, and the lowest of their keys.
    """
    listed = tl.zeros((), tl.int32)
    for begin in range(0, groups, CHUNK):
        group_E = begin + tl.arange(0, CHUNK)
        x_E = tl.load(maxima_ptr + group_E, group_E < groups, other=float("-inf"))
        take_E = (group_E < groups) & (_key(x_E) >= bound) & (_weight(x_E, top, rate) >= floor)
        place_E = listed + tl.cumsum(take_E.to(tl.int32), 0) - 1
        tl.store(listed_ptr + place_E, group_E, take_E)
        listed += tl.sum(take_E.to(tl.int32), 0)
    tl.debug_barrier()
    count = tl.zeros((), tl.int32)
    least = _key(top)
    for begin in range(0, listed, CHUNK // GROUP):
        which_g = begin + tl.arange(0, CHUNK // GROUP)
        group_g = tl.load(listed_ptr + which_g, which_g < listed, other=0)
        id_E = tl.reshape(group_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [CHUNK])
        inside_E = (begin + tl.arange(0, CHUNK) // GROUP < listed) & (id_E < vocab)
        x_E = _load_logits(logits_ptr, seen_ptr, penalty, id_E, inside_E)
        take_E = inside_E & (_key(x_E) >= bound) & (_weight(x_E, top, rate) >= floor)
        place_E = count + tl.cumsum(take_E.to(tl.int32), 0) - 1
        tl.store(values_ptr + place_E, x_E, take_E)
        tl.store(ids_ptr + place_E, id_E, take_E)
        count += tl.sum(take_E.to(tl.int32), 0)
        least = tl.minimum(least, tl.min(tl.where(take_E, _key(x_E), HIGHEST), 0))
    tl.debug_barrier()
    return count, least


@triton.jit
def _masses(values_ptr, count, key, least_weight, top, rate, CHUNK: tl.constexpr):
    """Mass above ``key``, how many lie at it, and the lowest key from it upwards whose weight is ``least_weight`` or more."""
    above_E = tl.zeros([CHUNK], tl.float64)
    equal_E = tl.zeros([CHUNK], tl.int32)
    least_E = tl.full([CHUNK], HIGHEST, tl.int32)
    for begin in range(0, count, CHUNK):
        place_E = begin + tl.arange(0, CHUNK)
        x_E = tl.load(values_ptr + place_E, place_E < count, other=float("-inf"))
        key_E = _key(x_E)
        weight_E = _weight(x_E, top, rate)
        above_E += tl.where(key_E > key, weight_E, 0.0).to(tl.float64)
        equal_E += ((key_E == key) & (place_E < count)).to(tl.int32)
        kept_E = (key_E >= key) & (place_E < count) & (weight_E >= least_weight)
        least_E = tl.minimum(least_E, tl.where(kept_E, key_E, HIGHEST))
    return tl.sum(above_E, 0), tl.sum(equal_E, 0), tl.min(least_E, 0)


@triton.jit
def _id_at(values_ptr, ids_ptr, count, key, number, CHUNK: tl.constexpr):
    """The id of the candidate that comes after ``number`` others at ``key``."""
    token = tl.zeros((), tl.int32)
    before = tl.zeros((), tl.int32)
    for begin in range(0, count, CHUNK):
        place_E = begin + tl.arange(0, CHUNK)
        x_E = tl.load(values_ptr + place_E, place_E < count, other=float("-inf"))
        id_E = tl.load(ids_ptr + place_E, place_E < count, other=0)
        equal_E = ((_key(x_E) == key) & (place_E < count)).to(tl.int32)
        number_E = before + tl.cumsum(equal_E, 0) - 1
        token += tl.sum(tl.where((equal_E > 0) & (number_E == number), id_E, 0), 0)
        before += tl.sum(equal_E, 0)
    return token


@triton.jit
def _draw_filtered(
    logits_ptr, seen_ptr, penalty, maxima_ptr, sums_ptr, listed_ptr, values_ptr, ids_ptr, vocab, groups,
    top, low, rate, top_k, top_p, min_p, uniform,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, SEARCH: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The first token, in descending order, where the running sum of the weights that the filters leave passes its target."""
    above = _key(top) + 1
    limited = (top_k > 0) & (top_k < vocab)
    needed = top_k.to(tl.float64) - 0.5
    total = tl.zeros((), tl.float64)
    bound = tl.full((), LOWEST, tl.int32)
    floor = tl.zeros((), tl.float32)
    if limited:
        if top_k <= groups:
            bound = _threshold(
                maxima_ptr, groups, _key(low), above, needed, 2.0 * needed, top, rate, False, PIVOTS // 4, CHUNK
            )
    else:
        total = _total_mass(maxima_ptr, sums_ptr, groups, top, rate, CHUNK)
        floor = min_p * 0.999
        if top_p < 1:
            floor = tl.maximum(floor, (0.5 * (1.0 - top_p) * total / vocab).to(tl.float32))
    count, lowest = _gather(
        logits_ptr, seen_ptr, penalty, maxima_ptr, listed_ptr, values_ptr, ids_ptr, vocab, groups,
        bound, floor, top, rate, GROUP, CHUNK,
    )  # fmt: skip
    if limited:
        cut = _threshold(values_ptr, count, lowest, above, needed, needed + 0.5, top, rate, False, PIVOTS, SEARCH)
        total, equal, lowest = _masses(values_ptr, count, cut, 0.0, top, rate, SEARCH)
        total += equal * _weight(_value(cut), top, rate).to(tl.float64)
    mass = top_p.to(tl.float64) * total
    if top_p < 1:  # a little less, for the mass to come to it rather than to pass it
        almost = mass * (1.0 - 2.0**-50)
        lowest = _threshold(values_ptr, count, lowest, above, almost, -1.0, top, rate, True, PIVOTS, SEARCH)
    passed, equal, least = _masses(values_ptr, count, lowest, min_p, top, rate, SEARCH)
    if least > lowest:  # min-p leaves fewer
        lowest = least
        passed, equal, least = _masses(values_ptr, count, lowest, min_p, top, rate, SEARCH)
    elif top_p < 1:  # of the tokens at the threshold as many as are needed, in order of ids
        short = tl.ceil((mass - passed) / tl.maximum(_weight(_value(lowest), top, rate), 1e-38))
        equal = tl.maximum(tl.minimum(short, equal.to(tl.float64)), 1.0).to(tl.int32)
    target = uniform * (passed + equal * _weight(_value(lowest), top, rate).to(tl.float64))
    drawn = _threshold(values_ptr, count, lowest, above, target, -1.0, top, rate, True, PIVOTS, SEARCH)
    passed, ties, least = _masses(values_ptr, count, drawn, 0.0, top, rate, SEARCH)
    ties = tl.where(drawn == lowest, equal, ties)
    number = tl.floor((target - passed) / tl.maximum(_weight(_value(drawn), top, rate), 1e-38))
    number = tl.maximum(tl.minimum(number, (ties - 1).to(tl.float64)), 0.0).to(tl.int32)
    return _id_at(values_ptr, ids_ptr, count, drawn, number, SEARCH)


@triton.jit
def pick_kernel(
    logits_ptr, seen_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, penalty_ptr, uniform_ptr,
    maxima_ptr, sums_ptr, listed_ptr, values_ptr, ids_ptr, token_ptr, vocab, groups,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, SEARCH: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The token of one row, which it also marks as seen."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    rate = LOG2_E / tl.where(temperature > 0, temperature, 1.0)
    penalty = tl.load(penalty_ptr + row)
    uniform = tl.load(uniform_ptr + row)
    logits_ptr += row * vocab
    if seen_ptr is not None:
        seen_ptr += row * vocab
    maxima_ptr += row * groups
    sums_ptr += row * groups
    top, low, broken = _extremes(maxima_ptr, groups, CHUNK)
    token = tl.full((), -1, tl.int32)
    if broken == 0:
        if temperature <= 0:
            token = _first_of_largest(logits_ptr, seen_ptr, penalty, maxima_ptr, vocab, groups, top, GROUP, CHUNK)
        elif (top_k <= 0) & (top_p >= 1) & (min_p <= 0):
            target = uniform * _total_mass(maxima_ptr, sums_ptr, groups, top, rate, CHUNK)
            token = _draw_by_id(
                logits_ptr, seen_ptr, penalty, maxima_ptr, sums_ptr, vocab, groups, top, rate, target,
                GROUP, CHUNK,
            )  # fmt: skip
        else:
            token = _draw_filtered(
                logits_ptr, seen_ptr, penalty, maxima_ptr, sums_ptr, listed_ptr + row * groups,
                values_ptr + row * vocab, ids_ptr + row * vocab, vocab, groups,
                top, low, rate, top_k, top_p, min_p, uniform, GROUP, CHUNK, SEARCH, PIVOTS,
            )  # fmt: skip
    tl.store(token_ptr + row, token)
    if seen_ptr is not None:
        tl.debug_barrier()  # every warp has read what this changes
        tl.store(seen_ptr + token, 1, token >= 0)
