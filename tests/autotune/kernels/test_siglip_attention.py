"""Two-way attention: heads that are no power of two, every split, strided views, odd numbers of patches."""

from __future__ import annotations

import itertools

import pytest
import torch

from autotune.gpu import GPUS
from autotune.kernel import Case, Config
from autotune.kernels.siglip_attention import SiglipAttention, siglip_attention, siglip_attention_oracle
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, H100, check_kernel

KERNEL = SiglipAttention()
GEMMA_4B = model_shapes(preset("4b"))


def case(images: int, patches: int, heads: int, head_dim: int) -> Case:
    dims = {"images": images, "patches": patches, "heads": heads, "head_dim": head_dim}
    return Case(dtype="bfloat16", dims=dims)


def config(*, loads: int = 0, split: int = 2, block_m: int = 64, block_n: int = 32, warps: int = 4) -> Config:
    constants = {"LOADS": loads, "SPLIT": split, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return Config(constants=constants, num_warps=warps, num_stages=2)


@pytest.mark.parametrize("loads", [0, 1])
@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize(("images", "patches", "heads", "head_dim"), [(2, 16, 2, 24), (1, 70, 3, 72), (1, 128, 1, 72)])
def test_holds_to_its_oracle(images: int, patches: int, heads: int, head_dim: int, split: int, loads: int) -> None:
    check_kernel(KERNEL, case(images, patches, heads, head_dim), config(loads=loads, split=split))


@pytest.mark.parametrize("head_dim", [5, 16, 20, 64])
def test_heads_of_other_sizes(head_dim: int) -> None:
    split = 2 if head_dim == 20 else 0
    check_kernel(KERNEL, case(1, 33, 2, head_dim), config(split=split))


def test_the_largest_score_may_come_late() -> None:
    """Each block of keys outdoes those before, so that every sum is shrunk."""
    qkv = KERNEL.inputs(case(1, 96, 1, 72), device=DEVICE)["qkv"]
    qkv[0, :, 1] *= torch.arange(1, 97, device=DEVICE).view(96, 1, 1) / 8
    q, k, v = qkv.unbind(2)
    out = siglip_attention(q, k, v, config=config())
    torch.testing.assert_close(out.float(), siglip_attention_oracle(q.float(), k.float(), v.float()), rtol=0, atol=4e-2)


def test_separate_tensors_and_views_of_one_buffer_agree() -> None:
    q, k, v = KERNEL.inputs(case(2, 40, 2, 72), device=DEVICE)["qkv"].unbind(2)
    whole = siglip_attention(q.contiguous(), k.contiguous(), v.contiguous(), config=config())
    assert torch.equal(siglip_attention(q, k, v, config=config()), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("loads", [0, 1])
@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize("patches", [4096, 1000])
def test_real_shapes(patches: int, split: int, loads: int) -> None:
    wanted = case(2, patches, 16, 72)
    for block_m, block_n, warps in itertools.product((64, 128), (64, 128), (4, 8)):
        chosen = config(loads=loads, split=split, block_m=block_m, block_n=block_n, warps=warps)
        if KERNEL.refusal(wanted, chosen, H100) is None:
            check_kernel(KERNEL, wanted, chosen)
    check_kernel(KERNEL, wanted)


def test_the_default_fits_every_gpu() -> None:
    for gpu in GPUS.values():
        for head_dim in (24, 64, 72):
            wanted = case(1, 4096, 16, head_dim)
            default = KERNEL.default(wanted, gpu)
            assert KERNEL.refusal(wanted, default, gpu) is None, f"{gpu.name}: {default}"


def test_what_a_model_runs_and_what_it_costs() -> None:
    (use,) = KERNEL.uses(GEMMA_4B, "vision", batch=2, context=0, dtype="bfloat16")
    assert (use.count, use.case) == (27, case(2, 4096, 16, 72))
    assert KERNEL.cost(use.case).flops == 4 * 2 * 16 * 4096 * 4096 * 72
    assert KERNEL.uses(GEMMA_4B, "prefill", batch=1, context=512, dtype="bfloat16") == ()


def test_the_launcher_says_what_does_not_fit() -> None:
    q, k, v = KERNEL.inputs(case(1, 16, 2, 72), device=DEVICE)["qkv"].unbind(2)
    with pytest.raises(UsageError, match=r"k must have the shape \(1, 16, 2, 72\) and the strides"):
        siglip_attention(q, k.contiguous(), v)
    with pytest.raises(UsageError, match=r"v must be torch\.bfloat16 on"):
        siglip_attention(q.contiguous(), k.contiguous(), v.float())
    with pytest.raises(UsageError, match="the lanes of a head must lie side by side"):
        siglip_attention(*(x.transpose(2, 3) for x in (q, k, v)))
    with pytest.raises(UsageError, match="scores and sums a thread take more registers"):
        siglip_attention(q, k, v, config=config(block_m=256, block_n=128))
