"""The ring after a chunk: short and long chunks, wraps, padding; bit for bit."""

from __future__ import annotations

import pytest
import torch

from autotune.correctness import compare
from autotune.gpu import GPUS
from autotune.kernel import Case, Config
from autotune.kernels.cache_write import CacheWrite, cache_write_
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, check_kernel
from tests.autotune.kernels.references import cache_of
from tests.autotune.kernels.test_window_decode import shapes

KERNEL = CacheWrite()


def case(*, batch: int = 2, tokens: int = 10, kv_heads: int = 2, head_dim: int = 16, window: int = 12) -> Case:
    dims = {"batch": batch, "tokens": tokens, "kv_heads": kv_heads, "head_dim": head_dim, "window": window}
    return Case(dtype="bfloat16", dims=dims)


@pytest.mark.parametrize("tokens", [1, 5, 12, 13, 40])
def test_holds_to_its_oracle(tokens: int) -> None:
    check_kernel(KERNEL, case(tokens=tokens), seed=tokens)


@pytest.mark.parametrize("block", [2, 8, 32])
def test_padding_stays_out_and_sequences_have_their_own_positions(block: int) -> None:
    chosen = case(batch=5, tokens=30)
    inputs = KERNEL.inputs(chosen, device=DEVICE)
    inputs["start"] = torch.tensor([0, 7, 100, 11, 12], dtype=torch.int32, device=DEVICE)
    inputs["length"] = torch.tensor([30, 3, 0, 13, 12], dtype=torch.int32, device=DEVICE)
    config = Config(constants={"BLOCK_ROWS": block, "DEPENDENT": 1}, num_warps=1, num_stages=1)
    for comparison in compare(KERNEL, chosen, config, inputs):
        assert comparison.passed and comparison.kernel_max == 0.0, str(comparison)


def test_two_chunks_leave_the_ring_of_the_whole_sequence() -> None:
    rows = torch.randn(25, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    ring = torch.full((1, 2, 12, 16), 7.0, dtype=torch.bfloat16, device=DEVICE)
    k_cache, v_cache = ring.clone(), ring.clone()
    for start, length in ((0, 5), (5, 20)):
        chunk = torch.full((1, 24, 2, 16), 9.0, dtype=torch.bfloat16)
        chunk[0, :length] = rows[start : start + length]
        at = (torch.tensor([value], dtype=torch.int32, device=DEVICE) for value in (start, length))
        cache_write_(chunk.to(DEVICE), -chunk.to(DEVICE), k_cache, v_cache, *at)
    expected = cache_of(rows, 25, 12, "ring").bfloat16()
    assert torch.equal(k_cache[0].cpu(), expected) and torch.equal(v_cache[0].cpu(), -expected)


def test_what_a_model_runs() -> None:
    model = shapes(heads=16, kv_heads=8, head_dim=256, window=1024)
    (use,) = KERNEL.uses(model, "prefill", batch=1, context=8192, dtype="bfloat16")
    assert use.count == 29
    assert KERNEL.cost(use.case).bytes == 2 * 2 * 8 * 1024 * 256 * 2  # only the last W rows move
    assert KERNEL.uses(model, "decode", batch=1, context=8192, dtype="bfloat16") == ()


def test_too_many_values_for_a_thread_are_refused() -> None:
    wide = Config(constants={"BLOCK_ROWS": 64, "DEPENDENT": 1}, num_warps=1, num_stages=1)
    assert "warps take more than 64 registers" in str(KERNEL.refusal(case(head_dim=256), wide, GPUS["h100"]))
    assert KERNEL.refusal(case(head_dim=256), KERNEL.default(case(head_dim=256), GPUS["h100"]), GPUS["h100"]) is None


def test_the_launcher_says_what_does_not_fit() -> None:
    inputs = KERNEL.inputs(case(), device=DEVICE)
    named = [inputs[name] for name in ("k", "v", "k_cache", "v_cache", "start", "length")]
    with pytest.raises(UsageError, match=r"v_cache must have the shape \(2, 2, 12, 16\), but has \(2, 2, 6, 16\)"):
        cache_write_(*named[:3], named[3][:, :, :6].contiguous(), *named[4:])
    with pytest.raises(UsageError, match=r"length must be torch.int32"):
        cache_write_(*named[:5], named[5].long())


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "tokens"), [(1, 8192), (3, 700), (16, 64)])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(8, 256), (16, 128), (1, 256)])
def test_real_shapes(kv_heads: int, head_dim: int, batch: int, tokens: int) -> None:
    check_kernel(KERNEL, case(batch=batch, tokens=tokens, kv_heads=kv_heads, head_dim=head_dim, window=1024))
