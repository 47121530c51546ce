"""Where positions lie in a local layer's cache, told by writing them down one by one."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from autotune.kernels.cache_layout import Layout, kept_rows_BC, slot_positions_BC, take_rows

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
WINDOWS = (1, 2, 5, 8)


def _positions(tokens: int, window: int, slots: int, layout: Layout) -> list[int]:
    """Position in each slot after ``tokens`` tokens, told token by token; -1 where there is none."""
    rows = [-1] * slots
    if layout == "ring":
        for position in range(max(0, tokens - window), tokens):
            rows[position % window] = position
        return rows
    kept: list[int] = []
    for position in range(tokens):
        if len(kept) == slots:
            kept = kept[slots - window + 1 :]
        kept.append(position)
    return kept + rows[len(kept) :]


def _cases() -> list[tuple[Layout, int, int]]:
    """(layout, window, slots): the ring has no slack."""
    compact = [("compact", window, window + slack) for window in WINDOWS for slack in (0, 1, 2, 5)]
    return [*(("ring", window, window) for window in WINDOWS), *compact]  # type: ignore[list-item]


@pytest.mark.parametrize(("layout", "window", "slots"), _cases())
def test_slot_positions(layout: Layout, window: int, slots: int) -> None:
    starts = torch.arange(3 * slots + 2)
    found = slot_positions_BC(starts, window, slots, layout).clamp(min=-1)
    assert found.tolist() == [_positions(int(n), window, slots, layout) for n in starts]


@pytest.mark.parametrize(("layout", "window", "slots"), _cases())
def test_kept_rows_move_positions_to_their_slots(layout: Layout, window: int, slots: int) -> None:
    """Positions themselves as the rows: after every chunk each slot must hold the one that belongs there."""
    chunk = slots + 3
    for start in range(2 * slots + 2):
        before = _positions(start, window, slots, layout)
        for length in range(chunk + 1):
            added = [start + i if i < length else 99 for i in range(chunk)]  # 99: padding, which must not enter
            rows = kept_rows_BC(torch.tensor([start]), torch.tensor([length]), window, slots, layout)[0]
            after = torch.tensor(before + added)[rows]
            wanted = torch.tensor(_positions(start + length, window, slots, layout))
            assert torch.equal(after[wanted >= 0], wanted[wanted >= 0]), (start, length)


def test_take_rows_gathers_for_each_sequence() -> None:
    rows_BGLD = torch.arange(2 * 3 * 4 * 2).view(2, 3, 4, 2)
    index = torch.tensor([[3, 0], [1, 1]])
    taken = take_rows(rows_BGLD, index)
    assert taken.shape == (2, 3, 2, 2)
    for sequence in range(2):
        assert torch.equal(taken[sequence], rows_BGLD[sequence][:, index[sequence]])
