"""Pooling and its norm in one kernel, against the op's oracle."""

from __future__ import annotations

import pytest
import torch

from autotune.kernel import Case, Config
from autotune.kernels.pool_norm import PoolNorm, pool_norm
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, check_kernel

KERNEL = PoolNorm()


def case(images: int, side: int, pool: int, hidden: int, dtype: str = "bfloat16") -> Case:
    return Case(dtype=dtype, dims={"images": images, "side": side, "pool": pool, "hidden": hidden})


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize(
    ("images", "side", "pool", "hidden"), [(1, 4, 2, 48), (2, 8, 4, 72), (3, 3, 1, 100), (1, 9, 3, 5), (2, 5, 5, 640)]
)
def test_holds_to_its_oracle(images: int, side: int, pool: int, hidden: int, dtype: str) -> None:
    check_kernel(KERNEL, case(images, side, pool, hidden, dtype))


@pytest.mark.parametrize("block", [1, 2, 16])
def test_every_number_of_patches_at_a_time(block: int) -> None:
    config = Config(constants={"BLOCK_PATCHES": block, "DEPENDENT": 1}, num_warps=4, num_stages=1)
    check_kernel(KERNEL, case(2, 6, 3, 70), config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("images", [1, 3])
def test_real_shapes(images: int, dtype: str) -> None:
    check_kernel(KERNEL, case(images, 64, 4, 1152, dtype))


def test_the_launcher_says_what_does_not_fit() -> None:
    scale = torch.ones(8, device=DEVICE)
    with pytest.raises(UsageError, match="a square of patches whose side is a multiple of 4, but holds 36"):
        pool_norm(torch.zeros(1, 36, 8, device=DEVICE), scale, 4)
    with pytest.raises(UsageError, match=r"scale must have the shape \(8,\), but has \(9,\)"):
        pool_norm(torch.zeros(1, 16, 8, device=DEVICE), torch.ones(9, device=DEVICE), 4)


def test_the_launcher_pools() -> None:
    x = torch.ones(2, 16, 8, device=DEVICE)
    torch.testing.assert_close(
        pool_norm(x, torch.full((8,), 2.0, device=DEVICE), 4), torch.full((2, 1, 8), 2.0, device=DEVICE)
    )
