"""Global attention over a linear cache, against full-length attention with a mask."""

from __future__ import annotations

import pytest
import torch

from autotune.kernels.global_attention import global_attention
from tests.autotune.kernels.references import Sequence, attention_TND, cache_of, chunk_of
from tests.tolerances import TOLERANCES, check, relative_error

# name: context, padded chunk size, (start, length) of each sequence, (heads, kv heads, head_dim)
Shape = tuple[int, int, tuple[tuple[int, int], ...], tuple[int, int, int]]
SHAPES: dict[str, Shape] = {
    "first token": (1, 1, ((0, 1),), (2, 1, 8)),
    "decode": (20, 1, ((3, 1), (19, 1)), (2, 1, 8)),
    "prefill fills the context": (9, 9, ((0, 9),), (4, 2, 8)),
    "second chunk, misaligned": (32, 6, ((5, 6),), (4, 1, 16)),
    "unequal lengths, padding, idle": (24, 7, ((0, 7), (3, 1), (11, 4), (9, 0), (0, 0)), (6, 3, 10)),
    "padding beyond the context": (12, 8, ((10, 2), (0, 8)), (2, 1, 8)),
    "odd everything": (23, 5, ((6, 5), (7, 3), (18, 5)), (5, 5, 6)),
}


@pytest.mark.parametrize("with_images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_full_length_attention(name: str, with_images: bool) -> None:
    context, size, spans, (heads, kv_heads, dim) = SHAPES[name]
    rows = [Sequence.random(i, start + n, heads, kv_heads, dim) for i, (start, n) in enumerate(spans)]
    pairs = list(zip(rows, spans, strict=True))
    q, k, v = (
        torch.stack([chunk_of(getattr(row, x), start, n, size) for row, (start, n) in pairs])
        for x in ("q_TND", "k_TGD", "v_TGD")
    )
    k_cache, v_cache = (
        torch.stack([cache_of(getattr(row, x), start, context, None) for row, (start, _) in pairs])
        for x in ("k_TGD", "v_TGD")
    )
    image_ids = torch.full((len(spans), size), -1)
    for i, (_, n) in enumerate(spans):
        image_ids[i, 1 : n // 2] = 0
        image_ids[i, n // 2 + 1 : n] = 1
    start_B, length_B = torch.tensor(spans).T
    out, k_after, v_after = global_attention(
        q, k, v, k_cache, v_cache, start_B, length_B, image_ids if with_images else None, 0.4
    )
    assert torch.isfinite(out).all(), "padding rows must stay finite"
    for i, (row, (start, n)) in enumerate(pairs):
        ids_T = torch.cat([torch.full((start,), -1), image_ids[i, :n]]) if with_images else None
        expected = attention_TND(row.q_TND, row.k_TGD, row.v_TGD, ids_T, None, 0.4)
        if n:
            check("kernel.attention", out[i, :n], expected[start:], f"{name}, sequence {i}")
        for after, whole in ((k_after, row.k_TGD), (v_after, row.v_TGD)):
            check("kernel.cache", after[i], cache_of(whole, start + n, context, None), f"{name}, cache of sequence {i}")


def test_a_causal_image_mask_is_caught() -> None:
    row = Sequence.random(0, 9, 2, 1, 8)
    ids = torch.tensor([-1, -1, 0, 0, 0, 0, -1, -1, -1])
    caches = [torch.zeros((1, 1, 9, 8))] * 2
    rows = (row.q_TND[None], row.k_TGD[None], row.v_TGD[None])
    out, _, _ = global_attention(*rows, *caches, torch.tensor([0]), torch.tensor([9]), None, 0.7)
    expected = attention_TND(row.q_TND, row.k_TGD, row.v_TGD, ids, None, 0.7)
    assert relative_error(out[0], expected) > 1000 * TOLERANCES["kernel.attention"].relative
