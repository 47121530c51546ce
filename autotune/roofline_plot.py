"""A roofline as inline SVG: operations a byte against operations a second, both logarithmic.

The page that holds it defines the classes ``grid``, ``roof``, ``ink``, ``over``, ``dim``, ``number`` and ``k0`` to ``k11`` (a kernel's colour).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 880, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 18, 46
COLOURS = 12


@dataclass(frozen=True, kw_only=True)
class Point:
    """A kernel's use.

    Args:
        number: the row of the table beside the plot.
        colour: of the kernel, 0 to 11.
        intensity: operations a byte.
        flops: operations a second.
        share: of the step, which the area shows.
        hollow: not measured: it stands on the roof.
        title: what hovering shows.
    """

    number: int
    colour: int
    intensity: float
    flops: float
    share: float
    hollow: bool
    title: str


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """A logarithmic axis from 10**low to 10**high, over pixels."""

    low: int
    high: int
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value, held within the axis."""
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + min(max(part, 0.0), 1.0) * (self.end - self.start)

    @property
    def decades(self) -> range:
        return range(self.low, self.high + 1)


def roofline_svg(points: Sequence[Point], *, read_bytes_per_s: float, peak_flops: float, label: str) -> str:
    """The plot. Points of no operations at all stand at the left edge."""
    ridge = peak_flops / read_bytes_per_s
    intensities = [point.intensity for point in points if point.intensity > 0] + [ridge / 10, ridge * 10]
    x = _Axis(low=_floor10(min(intensities)), high=-_floor10(1 / max(intensities)), start=_LEFT, end=WIDTH - _RIGHT)
    rates = [point.flops for point in points if point.flops > 0] + [10**x.low * read_bytes_per_s]
    y = _Axis(low=_floor10(min(rates)), high=-_floor10(1 / (peak_flops * 1.2)), start=HEIGHT - _BOTTOM, end=_TOP)
    parts = [
        f'<svg class="roofline" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">',
        *_grid(x, y),
        *_roof(x, y, read_bytes_per_s, peak_flops),
        # Large ones first, so that none hides another.
        *(_mark(point, x, y) for point in sorted(points, key=lambda point: -point.share)),
        *_labels(x, y, read_bytes_per_s, peak_flops),
        "</svg>",
    ]
    return "\n".join(parts)


def _grid(x: _Axis, y: _Axis) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for decade in x.decades:
        at = x.at(10.0**decade)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>')
        parts.append(
            f'<text class="dim" x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{_short(10.0**decade)}</text>'
        )
    for decade in y.decades:
        at = y.at(10.0**decade)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="dim" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_short(10.0 ** (decade - 12))}</text>'
        )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="ink" x="{(_LEFT + right) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">operations a byte</text>'
    )
    parts.append(
        f'<text class="ink" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">TFLOP/s</text>'
    )
    return parts


def _roof(x: _Axis, y: _Axis, read_bytes_per_s: float, peak_flops: float) -> list[str]:
    left = _left(x, y, read_bytes_per_s)
    corners = (left, left * read_bytes_per_s), (peak_flops / read_bytes_per_s, peak_flops), (10.0**x.high, peak_flops)
    line = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in corners)
    return [f'<polyline class="roof" points="{line}"/>']


def _labels(x: _Axis, y: _Axis, read_bytes_per_s: float, peak_flops: float) -> list[str]:
    """Both rates beside the roof, over the circles."""
    left, ridge = _left(x, y, read_bytes_per_s), peak_flops / read_bytes_per_s
    rise = y.at(left * read_bytes_per_s) - y.at(peak_flops)
    slope = math.degrees(math.atan2(rise, x.at(ridge) - x.at(left)))  # in pixels
    middle = math.sqrt(left * ridge)
    place = f"translate({x.at(middle):.1f} {y.at(middle * read_bytes_per_s):.1f}) rotate({-slope:.1f}) translate(0 -8)"
    memory, units = f"{read_bytes_per_s / 1e12:.2f} TB/s", f"{peak_flops / 1e12:.0f} TFLOP/s"
    return [
        f'<text class="over" text-anchor="middle" transform="{place}">{memory}</text>',
        f'<text class="over" text-anchor="end" x="{x.at(ridge):.1f}" y="{y.at(peak_flops) - 6:.1f}">{units}</text>',
    ]


def _left(x: _Axis, y: _Axis, read_bytes_per_s: float) -> float:
    """Where the slanted part enters the plot."""
    return max(10.0**x.low, 10.0**y.low / read_bytes_per_s)


def _mark(point: Point, x: _Axis, y: _Axis) -> str:
    radius = 7 + 20 * math.sqrt(min(max(point.share, 0.0), 1.0))
    across = max(x.at(point.intensity) if point.intensity > 0 else x.start, x.start + radius)
    up = min(y.at(point.flops) if point.flops > 0 else y.start, y.start - radius)
    fill = "hollow" if point.hollow else "full"
    return (
        f'<g class="k{point.colour} {fill}"><title>{escape(point.title)}</title>'
        f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{radius:.1f}"/>'
        f'<text class="number" x="{across:.1f}" y="{up + 3.5:.1f}" text-anchor="middle">{point.number}</text></g>'
    )


def _floor10(value: float) -> int:
    return math.floor(math.log10(value) + 1e-9)


def _short(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
