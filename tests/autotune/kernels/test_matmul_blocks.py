"""The product with weights in blocks of 32: both widths, every grid, unpacked in the loop and ahead of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autotune.gpu import GPUS
from autotune.kernel import Case, Config
from autotune.kernels.matmul import Matmul, matmul, matmul_blocks
from autotune.kernels.matmul_blocks import dequantise_oracle
from graphs.packing import pack_codes, pack_zeros
from graphs.weights import BlockFormat
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, H100, check_kernel

KERNEL = Matmul()
FLAGS = ("", "bias gelu", "geglu", "residual")


def case(dtype: str, rows: int, columns: int, depth: int, flags: str = "", zeros: int = 0) -> Case:
    dims = {"rows": rows, "columns": columns, "depth": depth, "zeros": zeros} | dict.fromkeys(flags.split(), 1)
    return Case(dtype=dtype, dims=dims)


def config(*, ahead: int, loads: int = 0, block: tuple[int, int, int] = (64, 64, 64)) -> Config:
    block_m, block_n, block_k = block
    constants = {"AHEAD": ahead, "LOADS": loads, "PROGRAMS": 0, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return Config(constants=constants | {"BLOCK_K": block_k, "GROUP": 4, "PARTS": 1}, num_warps=4, num_stages=3)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("zeros", [0, 1, 2])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("flags", FLAGS)
def test_holds_to_its_oracle(dtype: str, zeros: int, ahead: int, flags: str) -> None:
    check_kernel(KERNEL, case(dtype, 35, 72, 96, flags, zeros), config(ahead=ahead))


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 70, 32), (18, 5, 4304 // 16), (2, 66, 40)])
def test_odd_shapes(dtype: str, rows: int, columns: int, depth: int) -> None:
    for ahead in (0, 1):
        check_kernel(KERNEL, case(dtype, rows, columns, depth, "geglu", 1), config(ahead=ahead))


@pytest.mark.parametrize("block", [(16, 64, 32), (32, 64, 128), (128, 128, 64)])
@pytest.mark.parametrize("loads", [0, 1])
def test_tiles_and_loads(block: tuple[int, int, int], loads: int) -> None:
    check_kernel(KERNEL, case("int4", 35, 72, 168, "", 1), config(ahead=0, loads=loads, block=block))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("zeros", [0, 1, 2])
@pytest.mark.parametrize("flags", ["", "geglu"])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 2560, 4096), (300, 1152, 4304), (2000, 3840, 4096)])
def test_real_shapes(dtype: str, zeros: int, flags: str, rows: int, columns: int, depth: int) -> None:
    wanted = case(dtype, rows, columns, depth, flags, zeros)
    check_kernel(KERNEL, wanted)
    for loads in (0, 1):
        check_kernel(KERNEL, wanted, config(ahead=0, loads=loads, block=(128, 64, 64)))


@pytest.mark.parametrize("bits", [4, 8])
def test_reads_what_the_weights_file_holds(bits: int) -> None:
    """Codes and zeros as ``graphs.packing`` packs them, with a last block that is not full."""
    rows, depth, blocks = 6, 72, 3
    drawn = np.random.default_rng(0)
    codes = drawn.integers(0, 1 << bits, (rows, depth), dtype=np.uint8)
    zeros = drawn.integers(0, 1 << bits, (rows, blocks), dtype=np.uint8)
    scales = torch.rand(rows, blocks, generator=torch.Generator().manual_seed(1))
    form = BlockFormat(bits=4 if bits == 4 else 8, block_size=32, zero_points="integer")
    each = np.repeat(zeros, 32, axis=1)[:, :depth]
    w = (torch.from_numpy(codes).int() - torch.from_numpy(each).int()) * scales.repeat_interleave(32, 1)[:, :depth]
    packed = torch.from_numpy(pack_codes(codes, form)).flatten(1)
    packed_zeros = torch.from_numpy(pack_zeros(zeros, form))
    assert torch.equal(dequantise_oracle(packed, scales, packed_zeros, None, bits, depth), w)
    x = torch.randn(4, depth, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    y = matmul_blocks(x, packed.to(DEVICE), scales.to(DEVICE), bits=form.bits, zeros_NP=packed_zeros.to(DEVICE))
    expected = x.float() @ w.to(DEVICE).bfloat16().float().T
    torch.testing.assert_close(y.float(), expected, rtol=0.0, atol=0.01 * float(expected.abs().max()))


def test_the_default_fits_every_gpu() -> None:
    for gpu in GPUS.values():
        for rows in (1, 17, 300, 1024, 8192):
            for flags in FLAGS:
                for dtype in ("int4", "int8"):
                    wanted = case(dtype, rows, 10240, 2560, flags, 1)
                    default = KERNEL.default(wanted, gpu)
                    assert KERNEL.refusal(wanted, default, gpu) is None, f"{gpu.name}: {wanted}: {default}"


def test_the_workspace_is_asked_for_only_ahead_of_the_loop() -> None:
    wanted = case("int4", 3, 64, 64, "geglu")
    assert set(KERNEL.outputs(wanted, config(ahead=0), device="meta")) == {"y"}
    assert KERNEL.outputs(wanted, config(ahead=1), device="meta")["_weights"].shape == (128, 64)
    refused = KERNEL.refusal(wanted, config(ahead=0, block=(64, 32, 32)), H100)
    assert refused == "BLOCK_N, the left side of a product of unpacked weights, must be 64 or more, but is 32"


def test_the_launcher_says_what_does_not_fit() -> None:
    x = torch.zeros(3, 64, dtype=torch.bfloat16, device=DEVICE)
    codes, scales = torch.zeros(8, 32, dtype=torch.uint8, device=DEVICE), torch.zeros(8, 2, device=DEVICE)
    with pytest.raises(UsageError, match=r"codes must have the shape \(8, 64\), but has \(8, 32\)"):
        matmul_blocks(x, codes, scales, bits=8)
    with pytest.raises(UsageError, match="zeros or minimums, but both were given"):
        matmul_blocks(x, codes, scales, bits=4, zeros_NP=codes[:, :1], minimums_Nn=scales)
    with pytest.raises(UsageError, match=r"w must be torch.bfloat16, but is torch.uint8"):
        matmul(x, codes.repeat(1, 2))
