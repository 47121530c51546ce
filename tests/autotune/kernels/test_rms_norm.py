"""RMSNorm in both forms, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from autotune.kernel import Case, Config
from autotune.kernels.rms_norm import RmsNorm, add_rms_norm_, rms_norm
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, check_kernel

KERNEL = RmsNorm()


def case(rows: int, hidden: int, residual: int, dtype: str = "bfloat16") -> Case:
    return Case(dtype=dtype, dims={"rows": rows, "hidden": hidden, "residual": residual})


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("residual", [0, 1])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 72), (5, 640), (17, 1152), (2, 2560)])
def test_holds_to_its_oracle(rows: int, hidden: int, residual: int, dtype: str) -> None:
    check_kernel(KERNEL, case(rows, hidden, residual, dtype))


@pytest.mark.parametrize("block", [1, 2, 4])
def test_every_number_of_rows_in_a_program(block: int) -> None:
    config = Config(constants={"BLOCK_ROWS": block, "DEPENDENT": 1}, num_warps=4, num_stages=1)
    check_kernel(KERNEL, case(7, 100, 1), config)


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [0, 1])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 2560), (16, 3840), (8192, 3840), (1000, 5376)])
def test_real_shapes(rows: int, hidden: int, residual: int) -> None:
    check_kernel(KERNEL, case(rows, hidden, residual))


def test_the_launchers_say_what_does_not_fit() -> None:
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(UsageError, match=r"scale must have the shape \(64,\), but has \(63,\)"):
        rms_norm(x, torch.ones(63, device=DEVICE))
    with pytest.raises(UsageError, match=r"h must be contiguous"):
        add_rms_norm_(x.T.contiguous().T, x, torch.ones(64, device=DEVICE), torch.ones(64, device=DEVICE))
