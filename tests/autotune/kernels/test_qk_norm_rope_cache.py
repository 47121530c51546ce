"""Norm, rotation and where k and v go: chunk buffers, rings and linear caches; padding, idle sequences, large angles."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from autotune.correctness import compare
from autotune.gpu import GPUS
from autotune.kernel import Case, Config, Tensors
from autotune.kernels.qk_norm_rope_cache import QkNormRopeCache, _cos_sin, qk_norm_rope, qk_norm_rope_cache_
from autotune.kernels.rotary import inverse_frequencies, rotary_table, rotate
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, check_kernel
from tests.autotune.kernels.test_window_decode import shapes

KERNEL = QkNormRopeCache()


def case(
    *, batch: int = 2, tokens: int = 1, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, slots: int = 16
) -> Case:
    dims = {"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return Case(dtype="bfloat16", dims=dims | {"slots": slots})


def config(block: int) -> Config:
    return Config(constants={"BLOCK_HEADS": block, "DEPENDENT": 1}, num_warps=4, num_stages=1)


def check(chosen: Case, inputs: Tensors, block: int = 2) -> None:
    for comparison in compare(KERNEL, chosen, config(block), inputs):
        assert comparison.passed, f"{chosen}: {comparison}"


@pytest.mark.parametrize(
    "chosen",
    [
        case(),
        case(batch=1, heads=4, kv_heads=1, head_dim=256),
        case(batch=3, heads=6, kv_heads=3, head_dim=128, slots=5),
        case(tokens=7, slots=0),
        case(tokens=5, slots=9),
        case(batch=1, tokens=1, slots=0),
    ],
    ids=str,
)
def test_holds_to_its_oracle(chosen: Case) -> None:
    check_kernel(KERNEL, chosen)


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_every_number_of_heads_in_a_program(block: int) -> None:
    check_kernel(KERNEL, case(tokens=3, heads=6, kv_heads=3, slots=8), config(block))


def test_idle_sequences_and_padding_write_nothing() -> None:
    decode = case(batch=4)
    inputs = KERNEL.inputs(decode, device=DEVICE)
    inputs["start"] = torch.tensor([3, -1, 16 * 5 + 2, -1], dtype=torch.int32, device=DEVICE)
    check(decode, inputs)  # the oracle leaves their caches as they are
    prefill = case(batch=4, tokens=5)
    inputs = KERNEL.inputs(prefill, device=DEVICE)
    inputs["length"] = torch.tensor([5, 0, 3, 1], dtype=torch.int32, device=DEVICE)
    check(prefill, inputs)


def test_a_token_lands_in_its_slot() -> None:
    """Against the model's own pieces, not against the oracle."""
    inputs = KERNEL.inputs(case(), device=DEVICE)
    inputs["start"] = torch.tensor([35, 2], dtype=torch.int32, device=DEVICE)
    before = inputs["k_cache"].clone(), inputs["v_cache"].clone()
    named = (inputs[name] for name in ("qkv", "q_scale", "k_scale", "frequency", "start", "k_cache", "v_cache"))
    q = qk_norm_rope_cache_(*named, heads=4)
    rows = inputs["qkv"].view(2, 1, 8, 32)
    table = rotary_table(inputs["start"][:, None].long(), 32, 10_000.0, 1.0)
    for name, scale, heads, actual in (
        ("q", "q_scale", slice(0, 4), q[:, 0]),
        ("k", "k_scale", slice(4, 6), torch.stack([inputs["k_cache"][0, :, 3], inputs["k_cache"][1, :, 2]])),
    ):
        normed = torch.nn.functional.rms_norm(rows[:, :, heads].float(), (32,), inputs[scale], 1e-6).bfloat16()
        expected = rotate(normed, *table)[:, 0]
        torch.testing.assert_close(actual.float(), expected.float(), atol=0.03, rtol=0.02, msg=name)
    assert torch.equal(inputs["v_cache"][0, :, 3], rows[0, 0, 6:])
    assert torch.equal(inputs["v_cache"][1, :, 2], rows[1, 0, 6:])
    for cache, old in zip((inputs["k_cache"], inputs["v_cache"]), before, strict=True):
        changed = (cache != old).any(dim=(1, 3)).nonzero().tolist()
        assert changed == [[0, 3], [1, 2]]


@triton.jit
def _table_kernel(angle_ptr, cos_ptr, sin_ptr, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cos, sin = _cos_sin(tl.load(angle_ptr + offset))
    tl.store(cos_ptr + offset, cos)
    tl.store(sin_ptr + offset, sin)


def test_cos_and_sin_of_angles_up_to_the_longest_context() -> None:
    """fp32 angles as torch makes them, against float64; a bf16 step is 4e-3."""
    position = torch.tensor([0, 1, 2, 355, 4095, 105615, 131071, -1]).repeat(4)
    frequency = inverse_frequencies(256, 10_000.0, 1.0)
    angle = (position[:, None].float() * frequency).flatten().to(DEVICE)
    cos, sin = torch.empty_like(angle), torch.empty_like(angle)
    _table_kernel[(angle.numel() // 512,)](angle, cos, sin, BLOCK=512)
    tolerance = 4e-7 if angle.is_cuda else 4e-6  # the interpreter's fma rounds twice
    assert float((cos.double() - angle.double().cos()).abs().max()) < tolerance
    assert float((sin.double() - angle.double().sin()).abs().max()) < tolerance


def test_what_a_model_runs() -> None:
    model = shapes(heads=16, kv_heads=8, head_dim=256, window=1024)
    local, everywhere = KERNEL.uses(model, "decode", batch=2, context=1024, dtype="bfloat16")
    assert (local.case.dims["slots"], everywhere.case.dims["slots"]) == (1024, 1280)
    assert (local.count, everywhere.count, local.case.dims["tokens"]) == (29, 5, 1)
    local, everywhere = KERNEL.uses(model, "prefill", batch=1, context=8192, dtype="bfloat16")
    assert (local.case.dims["slots"], everywhere.case.dims["slots"]) == (0, 8192)
    assert KERNEL.cost(local.case).bytes == 2 * 2 * 8192 * 32 * 256
    assert KERNEL.uses(model, "vision", batch=1, context=0, dtype="bfloat16") == ()


def test_too_many_values_for_a_thread_are_refused() -> None:
    wide = Config(constants={"BLOCK_HEADS": 16, "DEPENDENT": 1}, num_warps=1, num_stages=1)
    assert "4096 values in 1 warps" in str(KERNEL.refusal(case(head_dim=256), wide, GPUS["h100"]))


def test_the_launchers_say_what_does_not_fit() -> None:
    inputs = KERNEL.inputs(case(tokens=3, slots=0), device=DEVICE)
    named = [inputs[name] for name in ("qkv", "q_scale", "k_scale", "frequency", "start")]
    with pytest.raises(UsageError, match=r"qkv must have the shape \(6, 224\), but has \(6, 256\)"):
        qk_norm_rope(*named, heads=3, kv_heads=2)
    with pytest.raises(UsageError, match=r"start must be torch.int32"):
        qk_norm_rope(*named[:4], named[4].long(), heads=4, kv_heads=2)
    cache = torch.zeros(2, 2, 2, 32, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(UsageError, match=r"a chunk of 3 tokens does not fit a cache of 2 slots"):
        qk_norm_rope_cache_(*named, cache, cache, heads=4)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 256), (32, 16, 128), (4, 1, 256)])
@pytest.mark.parametrize(("batch", "tokens", "slots"), [(1, 1, 1024), (16, 1, 4096), (1, 8192, 0), (2, 1000, 4096)])
def test_real_shapes(heads: int, kv_heads: int, head_dim: int, batch: int, tokens: int, slots: int) -> None:
    check_kernel(
        KERNEL,
        case(batch=batch, tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, slots=slots),
    )
