"""The page holds every row once, needs nothing from elsewhere, and its plot puts points where they belong."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from autotune.profile_page import as_page
from autotune.roofline_plot import HEIGHT, WIDTH, Point, roofline_svg
from tests.autotune.profiles import KERNELS, made

_VOID = {"meta", "br", "link", "img"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that was not open; collects the text and the addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    page = as_page(made(tmp_path, "prefill", "decode"))
    assert parsed(page).addresses == []
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page


def test_names_are_escaped(tmp_path: Path) -> None:
    page = as_page(made(tmp_path, "decode"))
    assert "<projection>" not in page
    assert "gate & up <projection> " in parsed(page).text


def test_rows_stand_in_the_order_of_their_loss(tmp_path: Path) -> None:
    profiled = made(tmp_path, "decode")
    page = as_page(profiled)
    found = re.findall(r'<tr><td>(\d+)</td><td class="where"><span class="key k\d+"></span>([^<]+) <span', page)
    assert found == [
        (str(number), row.use.name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
        for number, row in enumerate(profiled.stages[0].by_lost_time(), start=1)
    ]


def test_a_measured_page_says_what_is_lost_and_what_failed(tmp_path: Path) -> None:
    text = " ".join(parsed(as_page(made(tmp_path, "decode"))).text)
    for expected in ("lost µs a step", "failed", "sum of the kernels, 1 missing", "measured: a reduction; a product"):
        assert expected in text
    assert "bound by" not in text


def test_a_page_of_floors_has_no_empty_columns(tmp_path: Path) -> None:
    text = " ".join(parsed(as_page(made(tmp_path, "decode", measure=None))).text)
    for expected in ("floor µs a step", "bound by", "its datasheet's rates; nothing was measured"):
        assert expected in text
    assert "lost µs" not in text
    heads = re.findall("<th[^>]*>([^<]*)</th>", as_page(made(tmp_path, "decode", measure=None)))
    assert "GB/s" not in heads and len(heads) == 10


def test_the_whole_step_at_a_glance(tmp_path: Path) -> None:
    profiled = made(tmp_path, "decode", kernels=KERNELS[:3])
    (stage,) = profiled.stages
    text = parsed(as_page(profiled)).text
    assert stage.time_us is not None and stage.rate is not None
    for expected in (f"{stage.time_us / 1e3:.2f} ms", f"{stage.rate:.1f} tokens/s", "50%", f"{stage.time_us:,.1f}"):
        assert expected in text


def point(number: int, intensity: float, flops: float, *, share: float = 0.0, hollow: bool = False) -> Point:
    return Point(
        number=number, colour=number, intensity=intensity, flops=flops, share=share, hollow=hollow, title=f"p{number}"
    )


def circles(svg: str) -> dict[str, tuple[float, float, float]]:
    root = ElementTree.fromstring(svg)
    found = {}
    for group in root.findall("g"):
        circle, title = group.find("circle"), group.find("title")
        assert circle is not None and title is not None and title.text is not None
        found[title.text] = (float(circle.attrib["cx"]), float(circle.attrib["cy"]), float(circle.attrib["r"]))
    return found


def test_points_lie_on_logarithmic_axes_under_the_roof() -> None:
    read, peak = 3e12, 750e12
    svg = roofline_svg(
        [point(1, 2, 2 * read), point(2, 20, 20 * read), point(3, 200, 100 * read), point(4, 2e4, peak)],
        read_bytes_per_s=read,
        peak_flops=peak,
        label='a "label"',
    )
    at = circles(svg)
    step = at["p2"][0] - at["p1"][0]
    assert at["p3"][0] - at["p2"][0] == pytest.approx(step, abs=0.2)
    assert at["p4"][0] - at["p3"][0] == pytest.approx(2 * step, abs=0.2)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y, _ in at.values())
    roof = ElementTree.fromstring(svg).find("polyline")
    assert roof is not None
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in roof.attrib["points"].split())

    def height(x: float) -> float:
        return y1 if x >= x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    assert y1 == y2 and x2 == pytest.approx(WIDTH - 16, abs=1)
    assert at["p2"][1] == pytest.approx(height(at["p2"][0]), abs=0.2)  # both points are on the roof
    assert at["p4"][1] == pytest.approx(y2, abs=0.2)
    decade = at["p1"][1] - at["p2"][1]
    assert at["p3"][1] - height(at["p3"][0]) == pytest.approx(decade * math.log10(2), abs=0.5)  # half of the roof


def test_large_shares_are_large_and_lie_below_small_ones() -> None:
    svg = roofline_svg(
        [point(1, 10, 1e12, share=0.01), point(2, 10, 1e12, share=0.9, hollow=True)],
        read_bytes_per_s=3e12,
        peak_flops=1e15,
        label="x",
    )
    at = circles(svg)
    assert list(at) == ["p2", "p1"]
    assert at["p2"][2] > 2 * at["p1"][2]
    assert '<g class="k2 hollow">' in svg and '<g class="k1 full">' in svg


def test_a_kernel_without_operations_stands_at_the_edge() -> None:
    svg = roofline_svg([point(1, 0.0, 0.0)], read_bytes_per_s=3e12, peak_flops=1e15, label="x")
    assert circles(svg)["p1"][0] < 100
    assert "nan" not in svg and "inf" not in svg
