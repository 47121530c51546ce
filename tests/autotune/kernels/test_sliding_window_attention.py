"""Windowed attention over a ring and over a compact cache, against full-length attention with a mask."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from autotune.kernels.cache_layout import Layout
from autotune.kernels.sliding_window_attention import sliding_window_attention
from tests.autotune.kernels.references import Sequence, attention_TND, cache_of, chunk_of
from tests.tolerances import TOLERANCES, check, relative_error

LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# name: window, padded chunk size, (start, length) of each sequence, (heads, kv heads, head_dim)
Shape = tuple[int, int, tuple[tuple[int, int], ...], tuple[int, int, int]]
SHAPES: dict[str, Shape] = {
    "first token": (4, 1, ((0, 1),), (2, 1, 8)),
    "decode before, at and past the window": (4, 1, ((3, 1), (4, 1), (5, 1), (17, 1)), (2, 1, 8)),
    "prefill shorter than the window": (8, 5, ((0, 5),), (2, 2, 8)),
    "prefill of the window": (8, 8, ((0, 8),), (4, 2, 8)),
    "prefill longer than the window": (5, 13, ((0, 13),), (4, 2, 8)),
    "longer than two windows": (3, 11, ((2, 11),), (2, 1, 8)),
    "chunk wraps": (8, 6, ((5, 6),), (4, 1, 16)),
    "chunk of the window, misaligned": (8, 8, ((13, 8),), (4, 1, 16)),
    "window of one": (1, 3, ((4, 3),), (2, 1, 8)),
    "unequal lengths, padding, idle": (6, 7, ((0, 7), (3, 1), (11, 4), (9, 0), (0, 0), (2, 0)), (6, 3, 10)),
    "odd everything": (7, 5, ((6, 5), (7, 3), (20, 5)), (5, 5, 6)),
}


def _run(name: str, layout: Layout, scale: float = 0.7, images: dict[int, torch.Tensor] | None = None) -> None:
    """One chunk for a batch; checks outputs of real rows and the rows that both caches must hold."""
    window, size, spans, (heads, kv_heads, dim) = SHAPES[name]
    rows = [Sequence.random(i, start + n, heads, kv_heads, dim) for i, (start, n) in enumerate(spans)]
    pairs = list(zip(rows, spans, strict=True))
    q, k, v = (
        torch.stack([chunk_of(getattr(row, x), start, n, size) for row, (start, n) in pairs])
        for x in ("q_TND", "k_TGD", "v_TGD")
    )
    k_cache, v_cache = (
        torch.stack([cache_of(getattr(row, x), start, window, layout) for row, (start, _) in pairs])
        for x in ("k_TGD", "v_TGD")
    )
    start_B, length_B = torch.tensor(spans).T
    image_ids = None
    if images is not None:
        image_ids = torch.full((len(spans), size), -1)
        for i, ids_T in images.items():
            image_ids[i, : spans[i][1]] = ids_T[spans[i][0] :]
    out, k_after, v_after = sliding_window_attention(
        q, k, v, k_cache, v_cache, start_B, length_B, image_ids, window, scale, layout
    )
    assert torch.isfinite(out).all(), "padding rows must stay finite"
    for i, (row, (start, n)) in enumerate(pairs):
        ids_T = None if images is None else images.get(i)
        expected = attention_TND(row.q_TND, row.k_TGD, row.v_TGD, ids_T, window, scale)
        if n:
            check("kernel.attention", out[i, :n], expected[start:], f"{name}, {layout}, sequence {i}")
        for after, whole, before in ((k_after, row.k_TGD, k_cache), (v_after, row.v_TGD, v_cache)):
            right = cache_of(whole, start + n, window, layout) if n else before[i]
            check("kernel.cache", after[i], right, f"{name}, {layout}, cache of sequence {i}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_text(name: str, layout: Layout) -> None:
    _run(name, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["prefill longer than the window", "chunk wraps", "unequal lengths, padding, idle"])
def test_images(name: str, layout: Layout) -> None:
    """Images at random places of each chunk, one longer than the window where there is room."""
    _, _, spans, _ = SHAPES[name]
    images = {}
    for i, (start, n) in enumerate(spans):
        ids = torch.full((start + n,), -1)
        ids[start + 1 : start + n // 2] = 0
        ids[start + n // 2 + 1 : start + n] = 1
        images[i] = ids
    _run(name, layout, images=images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_the_size_of_a_chunk_longer_than_the_window(layout: Layout) -> None:
    _run("prefill longer than the window", layout, images={0: torch.zeros(13, dtype=torch.int64)})


@pytest.mark.parametrize("sizes", [[1] * 23, [23], [7, 7, 9], [2, 1, 13, 5, 2]], ids=str)
def test_layouts_agree_over_a_whole_sequence(sizes: list[int]) -> None:
    """The same chunks through both layouts: outputs agree, and equal full-length attention."""
    window, row = 5, Sequence.random(3, 23, 4, 2, 8)
    expected = attention_TND(row.q_TND, row.k_TGD, row.v_TGD, None, window, 0.3)
    for layout in LAYOUTS:
        caches = [torch.zeros((1, 2, window, 8)) for _ in range(2)]
        start, parts = 0, []
        for size in sizes:
            q, k, v = (x[None, start : start + size] for x in (row.q_TND, row.k_TGD, row.v_TGD))
            at = (torch.tensor([start]), torch.tensor([size]))
            out, *caches = sliding_window_attention(q, k, v, *caches, *at, None, window, 0.3, layout)
            parts.append(out[0])
            start += size
        check("kernel.attention", torch.cat(parts), expected, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [4, 6])
def test_a_wrong_window_is_caught(layout: Layout, window: int) -> None:
    """5 is right: the reference must tell it from its neighbours."""
    row = Sequence.random(0, 13, 2, 1, 8)
    caches = [torch.zeros((1, 1, window, 8))] * 2
    at = (torch.tensor([0]), torch.tensor([13]))
    rows = (row.q_TND[None], row.k_TGD[None], row.v_TGD[None])
    out, _, _ = sliding_window_attention(*rows, *caches, *at, None, window, 0.7, layout)
    expected = attention_TND(row.q_TND, row.k_TGD, row.v_TGD, None, 5, 0.7)
    assert relative_error(out[0], expected) > 1000 * TOLERANCES["kernel.attention"].relative
