"""Global decode against whole sequences, and at a model's shapes up to 131,072 keys."""

from __future__ import annotations

import pytest
import torch

from autotune.kernel import Case, Config
from autotune.kernels.global_decode import GlobalDecode, global_decode
from tests.autotune.checked import DEVICE, check_kernel
from tests.autotune.kernels.references import Sequence, attention_TND, cache_of
from tests.autotune.kernels.test_window_decode import shapes

KERNEL = GlobalDecode()


def test_each_sequence_sees_its_own_past() -> None:
    positions, slots = [0, 17, 33], 40
    sequence = Sequence.random(1, positions[-1] + 1, 2, 1, 16)
    q, k, v = (row.bfloat16().float() for row in (sequence.q_TND, sequence.k_TGD, sequence.v_TGD))
    expected = attention_TND(q, k, v, None, None, 0.25)
    caches = [
        torch.stack([cache_of(row, position + 1, slots, None) for position in positions]).bfloat16() for row in (k, v)
    ]
    out = global_decode(
        q[positions][:, None].bfloat16().to(DEVICE),
        *(cache.to(DEVICE) for cache in caches),
        torch.tensor(positions, dtype=torch.int32, device=DEVICE),
        scale=0.25,
        config=Config(constants={"SPLITS": 2, "BLOCK_K": 16, "DEPENDENT": 1}, num_warps=4, num_stages=2),
    )
    torch.testing.assert_close(out[:, 0].cpu().double(), expected[positions], atol=0.02, rtol=0.01)


def test_what_a_model_runs() -> None:
    model = shapes(heads=16, kv_heads=8, head_dim=256, window=1024)
    (use,) = KERNEL.uses(model, "decode", batch=4, context=1024, dtype="bfloat16")
    assert use.count == 5
    assert (use.case.dims["slots"], use.case.dims["keys"], use.case.dims["scale_dim"]) == (1280, 1025, 256)
    assert KERNEL.uses(model, "vision", batch=1, context=0, dtype="bfloat16") == ()


def test_lengths_share_a_configuration_up_to_the_next_power_of_two() -> None:
    model = shapes(heads=16, kv_heads=8, head_dim=256, window=1024)

    def bucket(context: int) -> str:
        return KERNEL.bucket(KERNEL.uses(model, "decode", batch=1, context=context, dtype="bfloat16")[0].case)

    assert bucket(4000) == bucket(2048) != bucket(2047)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [1000, 32768, 131072])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 256), (32, 16, 128), (8, 4, 256), (4, 1, 256)])
def test_real_shapes(heads: int, kv_heads: int, head_dim: int, keys: int) -> None:
    dims = {"batch": 1, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "slots": 131072, "keys": keys}
    check_kernel(KERNEL, Case(dtype="bfloat16", dims=dims | {"scale_dim": 256}))
