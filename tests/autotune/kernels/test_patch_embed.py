"""The patch embedding against torch's convolution."""

from __future__ import annotations

import pytest
import torch

from autotune.kernel import Case, Config
from autotune.kernels.patch_embed import PatchEmbed, patch_embed, patch_embed_oracle
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, check_kernel

KERNEL = PatchEmbed()


def case(images: int, size: int, patch: int, hidden: int, wide: int, dtype: str = "bfloat16") -> Case:
    dims = {"images": images, "size": size, "patch": patch, "hidden": hidden, "wide": wide}
    return Case(dtype=dtype, dims=dims)


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", 1), ("bfloat16", 0), ("float32", 1)])
@pytest.mark.parametrize(
    ("images", "size", "patch", "hidden"), [(1, 56, 14, 48), (2, 42, 14, 72), (1, 24, 4, 130), (3, 7, 7, 16)]
)
def test_holds_to_its_oracle(images: int, size: int, patch: int, hidden: int, wide: int, dtype: str) -> None:
    check_kernel(KERNEL, case(images, size, patch, hidden, wide, dtype))


@pytest.mark.parametrize("block_k", [16, 64])
def test_tiles_that_do_not_divide(block_k: int) -> None:
    constants = {"BLOCK_P": 32, "BLOCK_H": 64, "BLOCK_K": block_k, "DEPENDENT": 1}
    check_kernel(KERNEL, case(2, 70, 14, 100, 1), Config(constants=constants, num_warps=4, num_stages=2))


def test_the_oracle_is_a_convolution() -> None:
    t = KERNEL.inputs(case(2, 42, 14, 10, 1, "float32"), device="cpu")
    expected = torch.nn.functional.conv2d(t["pixels"], t["weight"], t["bias"], stride=14).flatten(2).transpose(1, 2)
    ours = patch_embed_oracle(t["pixels"], t["weight"], t["bias"], t["position"])
    torch.testing.assert_close(ours, expected + t["position"])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", 1), ("bfloat16", 0), ("float32", 1)])
@pytest.mark.parametrize("images", [1, 2])
def test_real_shapes(images: int, wide: int, dtype: str) -> None:
    check_kernel(KERNEL, case(images, 896, 14, 1152, wide, dtype))


def test_the_launcher_says_what_does_not_fit() -> None:
    pixels, bias = torch.zeros(1, 3, 28, 28, device=DEVICE), torch.zeros(8, device=DEVICE)
    weight, position = torch.zeros(8, 3, 14, 14, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(UsageError, match="patches of 14 pixels do not divide pictures of 30 x 30"):
        patch_embed(torch.zeros(1, 3, 30, 30, device=DEVICE), weight, bias, position)
    with pytest.raises(UsageError, match=r"position must have the shape \(4, 8\), but has \(5, 8\)"):
        patch_embed(pixels, weight, bias, torch.zeros(5, 8, device=DEVICE))
    with pytest.raises(UsageError, match=r"bias must be torch.float32, but is torch.bfloat16"):
        patch_embed(pixels, weight, bias.bfloat16(), position)
