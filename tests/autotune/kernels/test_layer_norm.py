"""LayerNorm in both forms, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from autotune.kernel import Case, Config
from autotune.kernels.layer_norm import LayerNorm, add_layer_norm_, layer_norm, layer_norm_oracle
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, check_kernel

KERNEL = LayerNorm()


def case(rows: int, hidden: int, residual: int, dtype: str = "bfloat16") -> Case:
    return Case(dtype=dtype, dims={"rows": rows, "hidden": hidden, "residual": residual})


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("residual", [0, 1])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 72), (5, 640), (17, 1152), (2, 33)])
def test_holds_to_its_oracle(rows: int, hidden: int, residual: int, dtype: str) -> None:
    check_kernel(KERNEL, case(rows, hidden, residual, dtype))


@pytest.mark.parametrize("block", [2, 4, 8])
def test_every_number_of_rows_in_a_program(block: int) -> None:
    config = Config(constants={"BLOCK_ROWS": block, "DEPENDENT": 1}, num_warps=4, num_stages=1)
    check_kernel(KERNEL, case(7, 100, 1), config)


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [0, 1])
@pytest.mark.parametrize("rows", [1, 4096, 12288])
def test_real_shapes(rows: int, residual: int) -> None:
    check_kernel(KERNEL, case(rows, 1152, residual))


def test_a_large_mean_costs_no_digits() -> None:
    """The variance is taken around the mean: a sum of squares less a squared sum would lose all of it here."""
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).add(3000).to(DEVICE)
    ones, zeros = torch.ones(96, device=DEVICE), torch.zeros(96, device=DEVICE)
    expected = layer_norm_oracle(x.double().sub(x.double().mean(1, keepdim=True)).float(), ones, zeros)
    torch.testing.assert_close(layer_norm(x, ones, zeros), expected, atol=2e-3, rtol=0)


def test_the_launchers_say_what_does_not_fit() -> None:
    x, ones = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE), torch.ones(64, device=DEVICE)
    with pytest.raises(UsageError, match=r"bias must have the shape \(64,\), but has \(63,\)"):
        layer_norm(x, ones, torch.ones(63, device=DEVICE))
    with pytest.raises(UsageError, match=r"h must be torch.bfloat16, but is torch.float32"):
        add_layer_norm_(x.float(), x, ones, ones)
