"""Window decode against whole sequences, before and after the ring wraps, and at a model's shapes."""

from __future__ import annotations

import pytest
import torch

from autotune.kernel import Case
from autotune.kernels.window_decode import WindowDecode, window_decode
from autotune.model_shapes import ModelShapes
from tests.autotune.checked import DEVICE, check_kernel
from tests.autotune.kernels.references import Sequence, attention_TND, cache_of

KERNEL = WindowDecode()
WINDOW = 12


def shapes(*, heads: int, kv_heads: int, head_dim: int, window: int, scalar: int = 256) -> ModelShapes:
    return ModelShapes(
        name="model", hidden=5376, ffn=1, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        query_pre_attn_scalar=scalar, vocab=1, window=window, local_layers=29, global_layers=5, vision=None,
    )  # fmt: skip


def test_a_ring_that_wraps_is_read_as_its_window() -> None:
    """Three sequences: within the first window, just past it, and after two rounds."""
    positions = [4, WINDOW, 2 * WINDOW + 5]
    sequence = Sequence.random(0, positions[-1] + 1, 4, 2, 32)
    rows = [sequence.q_TND, sequence.k_TGD, sequence.v_TGD]
    q, k, v = (row.bfloat16().float() for row in rows)
    expected = attention_TND(q, k, v, None, WINDOW, 0.2)
    caches = [
        torch.stack([cache_of(row, position + 1, WINDOW, "ring") for position in positions]).bfloat16()
        for row in (k, v)
    ]
    out = window_decode(
        q[positions][:, None].bfloat16().to(DEVICE),
        *(cache.to(DEVICE) for cache in caches),
        torch.tensor(positions, dtype=torch.int32, device=DEVICE),
        scale=0.2,
    )
    torch.testing.assert_close(out[:, 0].cpu().double(), expected[positions], atol=0.02, rtol=0.01)


def test_what_a_model_runs() -> None:
    model = shapes(heads=32, kv_heads=16, head_dim=128, window=1024, scalar=168)
    (use,) = KERNEL.uses(model, "decode", batch=2, context=8192, dtype="bfloat16")
    assert use.count == 29
    assert use.case.dims == {
        "batch": 2, "heads": 32, "kv_heads": 16, "head_dim": 128, "slots": 1024, "keys": 1024, "scale_dim": 168,
    }  # fmt: skip
    (early,) = KERNEL.uses(model, "decode", batch=1, context=9, dtype="bfloat16")
    assert early.case.dims["keys"] == 10
    assert KERNEL.uses(model, "prefill", batch=1, context=9, dtype="bfloat16") == ()


def test_the_cost_is_the_cache_read_once() -> None:
    (use,) = KERNEL.uses(
        shapes(heads=16, kv_heads=8, head_dim=256, window=1024), "decode", batch=1, context=4096, dtype="bfloat16"
    )
    assert KERNEL.cost(use.case).bytes == 2 * 8 * 1024 * 256 * 2 + 2 * 16 * 256 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [1, 63, 1000, 1024])
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 256), (32, 16, 128), (4, 1, 256)])
def test_real_shapes(heads: int, kv_heads: int, head_dim: int, batch: int, keys: int) -> None:
    dims = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "slots": 1024, "keys": keys}
    check_kernel(KERNEL, Case(dtype="bfloat16", dims=dims | {"scale_dim": 256}))
