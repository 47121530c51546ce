"""Where each token stands in its row, what it weighs, and which token lies at a given weight: the sampler's arithmetic.

Legend: E tokens at a time, P borders. Everything here is inlined into the functions of
:mod:`autotune.kernels.sample_passes`, which says what calls it.

A row is put in order by one int64 for each token, its ``order``: descending logits, then ascending ids; or ids alone.
No two tokens share one, so that ties need no rule of their own. A weight is an integer: 2**40 exp((x - top) / temperature),
made of one rounded fp32 subtraction, one rounded fp32 product and integer arithmetic. Sums of such weights are the same in
every order of adding up, on every GPU, and in torch (:func:`autotune.kernels.sample.weights_of`); a row of 2**22 tokens
cannot overflow them.

A place in a row is found by narrowing: borders split what is left of the order, the weight before each is added up, and
the part that holds the place is what is left. The borders need not be good for the result to be right.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIGHEST = tl.constexpr(2**31 - 1)
ID_BITS = tl.constexpr(31)
COMPARED = tl.constexpr(32)
OUTSIDE = tl.constexpr(2**63 - 1)
"""The order of what is no token."""
RATE = tl.constexpr(1.4426950408889634 * 2**24)
"""log2(e), in steps of a logarithm."""
FARTHEST = tl.constexpr(63.0 * 2**24)
"""Steps, of which 2**24 halve a weight; 41 x 2**24 leave nothing of it."""
NOTHING = tl.constexpr(41.5 * 2**24)
# 2**-(h + 1/2) for h from -1/2 to 1/2, in units of 2**-30, to 7e-9. The first is such that h = -1/2 gives 1 exactly.
C0 = tl.constexpr(759250127)
C1 = tl.constexpr(-526272103)
C2 = tl.constexpr(182392007)
C3 = tl.constexpr(-42140866)
C4 = tl.constexpr(7302511)
C5 = tl.constexpr(-1017428)
C6 = tl.constexpr(117391)


@triton.jit
def load_logits(logits_ptr, seen_ptr, penalty, id_E, inside_E):
    """Logits, penalised where the token was seen; -inf outside."""
    x_E = tl.load(logits_ptr + id_E, inside_E, other=float("-inf"))
    if seen_ptr is not None:
        seen_E = tl.load(seen_ptr + id_E, inside_E, other=0) != 0
        x_E = tl.where(seen_E, tl.where(x_E < 0, x_E * penalty, tl.div_rn(x_E, penalty)), x_E)
    return x_E


@triton.jit
def key_of(x):
    """An int32 that orders as floats do."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are one
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(key):
    """The float of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def depth_of(x):
    """An int64 from 0 to 2**32 - 1 that orders as floats do, the largest first."""
    return 0x7FFFFFFF - key_of(x).to(tl.int64)


@triton.jit
def order_of(x, token, by_id):
    """The order of a token with a logit."""
    return (tl.where(by_id, 0, depth_of(x)) << ID_BITS) | token


@triton.jit
def rate_of(temperature):
    """Steps of a weight's logarithm in a logit's 1."""
    return tl.div_rn(tl.full((), RATE, tl.float32), tl.where(temperature > 0, temperature, 1.0))


@triton.jit
def _next(m, h, c: tl.constexpr):
    """m h + c, in units of 2**-30."""
    return ((m.to(tl.int64) * h) >> 30).to(tl.int32) + c


@triton.jit
def weight_of(x, top, rate):
    """2**40 exp((x - top) / temperature), int64. It never rises from a logit to a smaller one."""
    steps = tl.minimum((top - x) * rate, FARTHEST).to(tl.int32)
    h = ((steps & 0xFFFFFF) * 64 - 2**29).to(tl.int64)
    m = _next(_next(_next(tl.full(h.shape, C6, tl.int32), h, C5), h, C4), h, C3)
    m = _next(_next(_next(m, h, C2), h, C1), h, C0)
    return (m.to(tl.int64) << 10) >> (steps >> 24).to(tl.int64)


@triton.jit
def least_weight(min_p):
    """The least that min-p leaves."""
    return tl.ceil(min_p.to(tl.float64) * 2.0**40).to(tl.int64)


@triton.jit
def last_of_nucleus(top_p, mass):
    """Where the last token that top-p keeps of ``mass`` lies."""
    needed = tl.ceil(top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
    return tl.where(top_p >= 1, mass, tl.minimum(tl.maximum(needed, 1), mass)) - 1


@triton.jit
def drawn_place(uniform, mass):
    """Where the token that a uniform number draws out of ``mass`` lies."""
    return tl.minimum((uniform * mass.to(tl.float64)).to(tl.int64), mass - 1)


@triton.jit
def _steps(first, last, step_P, PIVOTS: tl.constexpr):
    """Even steps from beyond ``first``, none beyond ``last``."""
    return tl.minimum(first + (last - first + PIVOTS) // (PIVOTS + 1) * step_P, last)


@triton.jit
def borders(low, high, vocab, PIVOTS: tl.constexpr, BY_VALUE: tl.constexpr):
    """Orders above ``low`` and below ``high``, by which to split what lies from ``low`` up to ``high``; ascending.

    They are even steps between ids where the logits at both ends are equal. Elsewhere they are even steps between logits
    (``BY_VALUE``, unless those are near), which splits most rows best, or between their bits, which splits every row.
    """
    step_P = tl.arange(0, PIVOTS) + 1
    first = low >> ID_BITS
    last = (high - 1) >> ID_BITS
    depth_P = _steps(first, last, step_P, PIVOTS)
    if BY_VALUE:
        share_P = step_P.to(tl.float32) * (1.0 / (PIVOTS + 1))
        largest = value_of((0x7FFFFFFF - first).to(tl.int32))
        least = value_of((0x7FFFFFFF - last).to(tl.int32))
        even_P = depth_of(largest * (1 - share_P) + least * share_P)
        even_P = tl.minimum(tl.maximum(even_P, first + 1), last)
        depth_P = tl.where(last - first > 65536, even_P, depth_P)
    end = (low - (low & HIGHEST)) | tl.minimum((high - 1) & HIGHEST, vocab - 1)
    return tl.where(last > first, depth_P << ID_BITS, _steps(low, end, step_P, PIVOTS))


@triton.jit
def narrowed(border_P, mass_P, target, low, high, base):
    """The part of the order from ``low`` to ``high`` that holds ``target``, and the mass before it.

    Args:
        mass_P: what lies from ``low`` up to each border.
        base: what lies before ``low``.
    """
    passed_P = base + mass_P <= target
    low = tl.maximum(low, tl.max(tl.where(passed_P, border_P, 0), 0))
    high = tl.minimum(high, tl.min(tl.where(passed_P, OUTSIDE, border_P), 0))
    return low, high, base + tl.max(tl.where(passed_P, mass_P, 0), 0)


@triton.jit
def _listed(values_ptr, ids_ptr, begin, count, low, high, by_id, SEARCH: tl.constexpr):
    """Tokens of a list: which lie from ``low`` up to ``high``, their orders, and their logits."""
    place_E = begin + tl.arange(0, SEARCH)
    x_E = tl.load(values_ptr + place_E, place_E < count, other=float("-inf"))
    id_E = tl.load(ids_ptr + place_E, place_E < count, other=0)
    order_E = order_of(x_E, id_E, by_id)
    inside_E = (place_E < count) & (order_E >= low) & (order_E < high)
    return inside_E, order_E, x_E


@triton.jit
def _ends(values_ptr, ids_ptr, count, low, high, by_id, SEARCH: tl.constexpr):
    """The part of the order that a list's tokens fill."""
    first_E = tl.full([SEARCH], OUTSIDE, tl.int64)
    last_E = tl.zeros([SEARCH], tl.int64)
    for begin in range(0, count, SEARCH):
        inside_E, order_E, _ = _listed(values_ptr, ids_ptr, begin, count, low, high, by_id, SEARCH)
        first_E = tl.minimum(first_E, tl.where(inside_E, order_E, OUTSIDE))
        last_E = tl.maximum(last_E, tl.where(inside_E, order_E, 0))
    return tl.min(first_E, 0), tl.max(last_E, 0) + 1


@triton.jit
def _split_list(
    values_ptr, ids_ptr, count, border_P, low, high, by_id, weighted, top, rate,
    PIVOTS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Mass and number of the tokens of a list from ``low`` up to each border."""
    mass_PE = tl.zeros([PIVOTS, SEARCH], tl.int64)
    number_PE = tl.zeros([PIVOTS, SEARCH], tl.int32)
    for begin in tl.range(0, count, SEARCH, loop_unroll_factor=2):
        inside_E, order_E, x_E = _listed(values_ptr, ids_ptr, begin, count, low, high, by_id, SEARCH)
        amount_E = tl.where(weighted, weight_of(x_E, top, rate), 1)
        before_PE = inside_E[None, :] & (order_E[None, :] < border_P[:, None])
        mass_PE += tl.where(before_PE, amount_E[None, :], 0)
        number_PE += before_PE.to(tl.int32)
    return tl.sum(mass_PE, 1), tl.sum(number_PE, 1)


@triton.jit
def compared(scratch_ptr, within, SEARCH: tl.constexpr, COMPARED: tl.constexpr):
    """Of a few tokens, in any order, each one's order, amount, the amount of those before it, and how many logits are larger.

    Each is compared with all, ``COMPARED`` of them at a time.
    """
    place_E = tl.arange(0, SEARCH)
    order_E = tl.load(scratch_ptr + place_E, place_E < within, other=OUTSIDE)
    amount_E = tl.load(scratch_ptr + SEARCH + place_E, place_E < within, other=0)
    before_E = tl.zeros([SEARCH], tl.int64)
    larger_E = tl.zeros([SEARCH], tl.int32)
    for begin in range(0, within, COMPARED):
        place_C = begin + tl.arange(0, COMPARED)
        order_C = tl.load(scratch_ptr + place_C, place_C < within, other=OUTSIDE)
        amount_C = tl.load(scratch_ptr + SEARCH + place_C, place_C < within, other=0)
        earlier_CE = order_C[:, None] < order_E[None, :]
        before_E += tl.sum(tl.where(earlier_CE, amount_C[:, None], 0), 0)
        larger_E += tl.sum(((order_C >> ID_BITS)[:, None] < (order_E >> ID_BITS)[None, :]).to(tl.int32), 0)
    return order_E, amount_E, before_E, larger_E


@triton.jit
def covering(order_E, amount_E, before_E, target):
    """The order of the token that ``target`` lies in, and the amount up to and with it."""
    found_E = (before_E <= target) & (target < before_E + amount_E)
    order = tl.sum(tl.where(found_E, order_E, 0), 0)
    return order, tl.sum(tl.where(found_E, before_E + amount_E, 0), 0)


@triton.jit
def put_in_scratch(values_ptr, ids_ptr, scratch_ptr, count, by_id, weighted, top, rate, SEARCH: tl.constexpr):
    """Orders and weights (or ones) of a list of up to ``SEARCH`` tokens."""
    place_E = tl.arange(0, SEARCH)
    x_E = tl.load(values_ptr + place_E, place_E < count, other=float("-inf"))
    id_E = tl.load(ids_ptr + place_E, place_E < count, other=0)
    tl.debug_barrier()  # what lay there is read
    tl.store(scratch_ptr + place_E, order_of(x_E, id_E, by_id), place_E < count)
    tl.store(scratch_ptr + SEARCH + place_E, tl.where(weighted, weight_of(x_E, top, rate), 1), place_E < count)


@triton.jit
def token_at(
    values_ptr, ids_ptr, scratch_ptr, count, low, high, base, target, by_id, weighted, top, rate, vocab,
    PIVOTS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """The token of a list that ``target`` lies in, the tokens put in order and their masses end to end.

    Args:
        values_ptr, ids_ptr: ``count`` tokens, in any order.
        scratch_ptr: 2 SEARCH int64 of the program's own.
        low, high: the orders of all tokens lie from ``low`` up to ``high``.
        base: the mass before ``low``.
        weighted: False counts tokens instead of adding up weights.

    Returns:
        its order, whose low bits are its id, and the mass up to and with it.
    """
    within = count
    if count > SEARCH:
        # Most of a long list are often equal logits.
        low, high = _ends(values_ptr, ids_ptr, count, low, high, by_id, 4 * SEARCH)
        while within > SEARCH:
            border_P = borders(low, high, vocab, PIVOTS // 2, False)
            mass_P, number_P = _split_list(
                values_ptr, ids_ptr, count, border_P, low, high, by_id, weighted, top, rate, PIVOTS // 2, SEARCH
            )
            passed_P = base + mass_P <= target
            most = tl.min(tl.where(passed_P, within, number_P), 0)
            within = most - tl.max(tl.where(passed_P, number_P, 0), 0)
            low, high, base = narrowed(border_P, mass_P, target, low, high, base)
        tl.debug_barrier()  # what lay in the scratch is read
        found = tl.zeros((), tl.int32)
        for begin in range(0, count, 4 * SEARCH):
            inside_E, order_E, x_E = _listed(values_ptr, ids_ptr, begin, count, low, high, by_id, 4 * SEARCH)
            amount_E = tl.where(weighted, weight_of(x_E, top, rate), 1)
            place_E = found + tl.cumsum(inside_E.to(tl.int32), 0) - 1
            tl.store(scratch_ptr + place_E, order_E, inside_E)
            tl.store(scratch_ptr + SEARCH + place_E, amount_E, inside_E)
            found += tl.sum(inside_E.to(tl.int32), 0)
    else:
        put_in_scratch(values_ptr, ids_ptr, scratch_ptr, count, by_id, weighted, top, rate, SEARCH)
    tl.debug_barrier()
    order_E, amount_E, before_E, _ = compared(scratch_ptr, within, SEARCH, COMPARED)
    return covering(order_E, amount_E, base + before_E, target)
