"""The table of a profile's page: a row a use, the largest loss first, and a bar of floor and loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Literal

from autotune.profile import Row, StageProfile


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column of the table: its cells and its sum as HTML; ``when`` says which kind of profile shows it."""

    head: str
    cell: Callable[[StageProfile, Row], str]
    total: Callable[[StageProfile], str] = lambda stage: ""
    left: bool = False
    when: Literal["always", "measured", "floor"] = "always"


_COLUMNS = (
    _Column(
        head="calls",
        cell=lambda stage, row: str(row.use.count),
        total=lambda stage: str(sum(row.use.count for row in stage.rows)),
    ),
    _Column(
        head="µs",
        when="measured",
        cell=lambda stage, row: _time(row),
        total=lambda stage: _optional(stage.time_us, ",.1f"),
    ),
    _Column(
        head="floor µs",
        cell=lambda stage, row: f"{row.floor_us:,.2f}",
        total=lambda stage: f"{stage.floor_us:,.1f}",
    ),
    _Column(
        head="floor µs a step",
        when="floor",
        cell=lambda stage, row: f"{row.step_floor_us:,.1f}",
        total=lambda stage: f"{stage.floor_us:,.1f}",
    ),
    _Column(head="MB", when="floor", cell=lambda stage, row: f"{row.cost.bytes / 1e6:,.2f}"),
    _Column(head="GFLOP", when="floor", cell=lambda stage, row: f"{row.cost.flops / 1e9:,.3f}"),
    _Column(head="bound by", when="floor", left=True, cell=lambda stage, row: row.bound),
    _Column(
        head="of floor",
        when="measured",
        cell=lambda stage, row: _optional(row.roofline, ".0%"),
        total=lambda stage: _optional(stage.roofline, ".0%"),
    ),
    _Column(head="GB/s", when="measured", cell=lambda stage, row: f"{row.rates()[0]:,.0f}" if row.time_us else ""),
    _Column(head="TFLOP/s", when="measured", cell=lambda stage, row: f"{row.rates()[1]:.1f}" if row.time_us else ""),
    _Column(head="share", cell=lambda stage, row: _optional(stage.share(row), ".1%")),
    _Column(
        head="lost µs a step",
        when="measured",
        cell=lambda stage, row: _optional(row.lost_us, ",.1f"),
        total=lambda stage: _optional(stage.lost_us, ",.1f"),
    ),
)


def table_html(stage: StageProfile, rows: list[Row], colours: dict[str, int]) -> str:
    """The table; ``colours`` are the numbers of the kernels' classes ``k0``, ``k1`` and so on."""
    shown = [column for column in _COLUMNS if column.when in ("always", "measured" if stage.measured else "floor")]
    head = "".join(f"<th{' class=left' if column.left else ''}>{column.head}</th>" for column in shown)
    longest = max((row.step_time_us or row.step_floor_us for row in rows), default=1.0)
    body = []
    for number, row in enumerate(rows, start=1):
        cells = "".join(_cell(column, stage, row) for column in shown)
        body.append(f"<tr><td>{number}</td>{_where(row, colours)}{cells}{_bar(row, colours, longest)}</tr>")
    foot = "".join(f"<td>{column.total(stage)}</td>" for column in shown)
    bars = "floor and loss" if stage.measured else "floor"
    return (
        f'<table><thead><tr><th></th><th class="left">where</th>{head}<th class="left">{bars}</th></tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + f'\n</tbody>\n<tfoot><tr><td></td><td class="left">the step</td>{foot}<td></td></tr></tfoot></table>'
    )


def _where(row: Row, colours: dict[str, int]) -> str:
    stands_in = "" if row.choice.tuned_here or row.choice.record is None else ", stands in"
    config = escape(f"{row.choice.config} ({row.choice.origin}{stands_in})")
    key = f'<span class="key k{colours[row.kernel]}"></span>'
    name, case = escape(row.use.name), escape(str(row.use.case))
    kernel = f'<span class="dim">{escape(row.kernel)}</span>'
    return f'<td class="where">{key}{name} {kernel}<small>{case}</small><small>{config}</small></td>'


def _bar(row: Row, colours: dict[str, int], longest: float) -> str:
    """The step's time here: its floor in the kernel's colour, then what is lost."""
    floor, lost = 100 * row.step_floor_us / longest, 100 * max(row.lost_us or 0.0, 0.0) / longest
    parts = f'<i style="width: {min(floor, 100):.2f}%"></i><b style="width: {lost:.2f}%"></b>'
    return f'<td class="bar k{colours[row.kernel]}"><div>{parts}</div></td>'


def _cell(column: _Column, stage: StageProfile, row: Row) -> str:
    return f"<td{' class=left' if column.left else ''}>{column.cell(stage, row)}</td>"


def _time(row: Row) -> str:
    if row.failure:
        return f'<span class="failed" title="{escape(row.failure, quote=True)}">failed</span>'
    return _optional(row.time_us, ",.2f")


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
