"""The product with bf16 weights: every epilogue on odd shapes, every way to load and to order tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from autotune.gpu import GPUS
from autotune.kernel import Case, Config, Stage
from autotune.kernels.matmul import Matmul, matmul
from autotune.kernels.matmul_product import product_of
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, H100, check_kernel

KERNEL = Matmul()
FLAGS = (
    "",
    "bias",
    "bias gelu",
    "geglu",
    "bias geglu",
    "residual",
    "bias residual",
    "transposed",
    "bias gelu residual",
)
GEMMA_4B = model_shapes(preset("4b"))
NANO = model_shapes(preset("nano"))


def case(rows: int, columns: int, depth: int, flags: str = "") -> Case:
    dims = {"rows": rows, "columns": columns, "depth": depth} | dict.fromkeys(flags.split(), 1)
    return Case(dtype="bfloat16", dims=dims)


def config(*, loads: int = 0, programs: int = 0, block: tuple[int, int, int] = (64, 32, 32), parts: int = 1) -> Config:
    block_m, block_n, block_k = block
    constants = {"LOADS": loads, "PROGRAMS": programs, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return Config(constants=constants | {"GROUP": 4, "PARTS": parts}, num_warps=4, num_stages=3)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 40, 64), (67, 72, 40), (130, 1, 8)])
def test_holds_to_its_oracle(rows: int, columns: int, depth: int, flags: str) -> None:
    check_kernel(KERNEL, case(rows, columns, depth, flags), config())


@pytest.mark.parametrize("flags", FLAGS)
def test_tensor_descriptors(flags: str) -> None:
    check_kernel(KERNEL, case(67, 72, 40, flags), config(loads=1))


@pytest.mark.parametrize("depth", [1, 7, 588 // 4, 130])
def test_a_depth_that_no_vector_divides(depth: int) -> None:
    check_kernel(KERNEL, case(5, 33, depth, "bias residual"), config())


@pytest.mark.parametrize("flags", ["", "geglu", "bias residual"])
@pytest.mark.parametrize("parts", [1, 2])
def test_programs_that_take_many_tiles(flags: str, parts: int) -> None:
    three = dataclasses.replace(H100, multiprocessors=3)
    wanted, chosen = case(200, 150, 48, flags), config(loads=1, programs=3, block=(64, 64, 32), parts=parts)
    assert KERNEL.refusal(wanted, chosen, three) is None
    assert KERNEL.refusal(wanted, chosen, H100) is not None
    x = KERNEL.inputs(wanted, device=DEVICE)
    y = KERNEL.run(wanted, chosen, x)["y"]
    torch.testing.assert_close(y.float(), KERNEL.oracle(wanted, x)["y"].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 2560, 4096), (300, 1152, 4304), (4096, 4304, 1152), (8192, 3840, 4096), (1000, 1152, 588)])  # fmt: skip
def test_real_shapes(rows: int, columns: int, depth: int, flags: str) -> None:
    wanted = case(rows, columns, depth, flags)
    check_kernel(KERNEL, wanted)
    for loads in (0, 1):
        chosen = config(loads=loads, block=(128, 128 if "geglu" not in flags else 64, 64))
        if KERNEL.refusal(wanted, chosen, H100) is None:
            check_kernel(KERNEL, wanted, chosen)


def test_the_default_fits_every_gpu() -> None:
    for gpu in GPUS.values():
        for rows in (1, 17, 300, 1024, 8192):
            for flags in FLAGS:
                for columns, depth in ((1152, 588), (4304, 1152), (1152, 4304), (30720, 3840), (3840, 15360)):
                    wanted = case(rows, columns, depth, flags)
                    default = KERNEL.default(wanted, gpu)
                    assert KERNEL.refusal(wanted, default, gpu) is None, f"{gpu.name}: {wanted}: {default}"
                    for name, values in KERNEL.space(wanted).constants.items():
                        assert default.constants[name] in values, f"{gpu.name}: {wanted}: {default}: {name}"


def test_products_of_a_model() -> None:
    prefill = KERNEL.uses(GEMMA_4B, "prefill", batch=2, context=512, dtype="int4")
    assert [(use.name, use.count) for use in prefill] == [(name, 34) for name in ("qkv", "attention out", "gate and up", "down")]  # fmt: skip
    assert [product_of(use.case).shape for use in prefill] == [(1024, 4096, 2560), (1024, 2560, 2048), (1024, 10240, 2560), (1024, 2560, 10240)]  # fmt: skip
    vision = KERNEL.uses(GEMMA_4B, "vision", batch=1, context=0, dtype="int4")
    assert sum(use.count * KERNEL.cost(use.case).flops for use in vision) == pytest.approx(3.36e12, rel=0.01)
    assert KERNEL.uses(GEMMA_4B, "decode", batch=1, context=512, dtype="int4") == ()


@pytest.mark.parametrize("stage", KERNEL.stages)
def test_products_of_nano(stage: Stage) -> None:
    for use in KERNEL.uses(NANO, stage, batch=1, context=9, dtype="bfloat16"):
        check_kernel(KERNEL, use.case)


def test_cases_and_launchers_say_what_does_not_fit() -> None:
    x, w = (torch.zeros(3, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    with pytest.raises(UsageError, match=r"w must have the shape \(3, 16\), but has \(3, 8\)"):
        matmul(x, w[:, :8])
    with pytest.raises(UsageError, match=r"bias must have the shape \(3,\), but has \(2,\)"):
        matmul(x, w, bias_N=x[0, :2])
    with pytest.raises(UsageError, match=r"BLOCK_M must be 64 or more"):
        matmul(x, w, config=config(block=(32, 32, 32)))
    with pytest.raises(UsageError, match=r"gelu and geglu cannot both follow"):
        product_of(case(1, 2, 3, "gelu geglu"))
    with pytest.raises(UsageError, match=r"matmul knows no case `bfloat16 rows=1 columns=2 depth=3 relu=1`"):
        product_of(case(1, 2, 3, "relu"))


def test_the_residual_may_be_written_over() -> None:
    wanted = case(5, 40, 32, "bias residual")
    tensors = KERNEL.inputs(wanted, device=DEVICE)
    expected = KERNEL.run(wanted, config(), tensors)["y"]
    for launch in KERNEL.launches(wanted, config(), tensors | {"y": tensors["residual"]}):
        launch.run()
    assert torch.equal(tensors["residual"], expected)
