"""Products by pieces: the kernel that Triton's interpreter does not run, on CPU tensors and on a GPU."""

from __future__ import annotations

import pytest
import triton

from autotune.correctness import compare
from autotune.gpu import GPUS
from autotune.kernel import Case, Config
from autotune.kernels.matvec import Matvec
from autotune.kernels.matvec_space import ADD, PIECES, POST_NORM, SPREAD
from autotune.launch import Launch
from tests.autotune.checked import H100, check_kernel
from tests.autotune.kernels.matvec_pieces_emulation import run_emulated

KERNEL = Matvec()
PIECE = {"bfloat16": 8, "int8": 16, "int4": 32}
GRIDS = [(dtype, zeros, bits) for dtype in PIECE for zeros in (0, 1) for bits in (32, 16) if dtype != "bfloat16"]


def config(dtype: str, *, way: int = PIECES, tiles: int = 1, warps: int = 1, ahead: int = 1) -> Config:
    constants = {"DOT": way, "BLOCK_N": 16, "BLOCK_K": 4 * PIECE[dtype] * warps, "LOOP": tiles, "SPLIT": 1}
    return Config(constants=constants | {"DEPENDENT": 1}, num_warps=warps, num_stages=ahead)


def check(shape: Case, chosen: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors."""
    monkeypatch.setattr(Launch, "run", run_emulated)
    for comparison in compare(KERNEL, shape, chosen, KERNEL.inputs(shape, device="cpu")):
        assert comparison.passed, f"{shape}, {chosen}: {comparison}"


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 13, 16])
def test_every_batch(rows: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Case(dtype=dtype, dims={"rows": rows, "columns": 37, "depth": 352})
    check(shape, config(dtype, warps=2), monkeypatch)


@pytest.mark.parametrize(("dtype", "zeros", "scale_bits"), GRIDS)
def test_every_grid(dtype: str, zeros: int, scale_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depth 352 has eleven blocks: half of the last byte of zeros is nobody's."""
    dims = {"rows": 2, "columns": 37, "depth": 352, "zeros": zeros, "scale_bits": scale_bits}
    check(Case(dtype=dtype, dims=dims), config(dtype), monkeypatch)


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("flags", [{"geglu": 1}, {"residual": ADD}, {"geglu": 1, "residual": ADD, "fp32": 1}], ids=str)
def test_every_option(flags: dict[str, int], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Case(dtype=dtype, dims={"rows": 3, "columns": 53, "depth": 256} | flags)
    check(shape, config(dtype, tiles=2, warps=2), monkeypatch)


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize(("warps", "ahead"), [(1, 1), (1, 3), (1, 6), (2, 2), (2, 3), (4, 1)])
def test_every_way_through_the_depth(warps: int, ahead: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty-one and a half steps of a warp, in whole rounds and in others, that the compiler unrolls or does not."""
    depth = {"bfloat16": 688, "int8": 1376, "int4": 2752}[dtype]
    check(
        Case(dtype=dtype, dims={"rows": 1, "columns": 16, "depth": depth}),
        config(dtype, warps=warps, ahead=ahead),
        monkeypatch,
    )


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"zeros": 1},
        {"zeros": 2},
        {"zeros": 1, "scale_bits": 16},
        {"norm": 1, "geglu": 1, "zeros": 1},
        {"residual": ADD, "norm": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("tiles", "warps", "ahead"), [(1, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_activations_that_are_spread_over_the_blocks(
    tiles: int, warps: int, ahead: int, flags: dict[str, int], rows: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Case(dtype=dtype, dims={"rows": rows, "columns": 53, "depth": 352} | flags)
    check(shape, config(dtype, way=SPREAD, tiles=tiles, warps=warps, ahead=ahead), monkeypatch)


def test_what_is_refused() -> None:
    plain = {"rows": 1, "columns": 64, "depth": 512}
    for dims, words in (
        ({"residual": POST_NORM}, "no norm"),
        ({"norm": 1}, "no norm"),
        ({"zeros": 2}, "without minimums"),
        ({}, "interpreter" if triton.knobs.runtime.interpret else "None"),
    ):
        assert words in str(KERNEL.refusal(Case(dtype="int4", dims=plain | dims), config("int4"), H100))
    chosen = Config(constants=dict(config("int4").constants) | {"DEPENDENT": 0}, num_warps=1, num_stages=1)
    assert "begin before" in str(KERNEL.refusal(Case(dtype="int4", dims=plain), chosen, H100))
    assert "9.0" in str(KERNEL.refusal(Case(dtype="int4", dims=plain), config("int4"), GPUS["a100"]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("rows", [1, 2, 8, 16])
@pytest.mark.parametrize(("columns", "depth"), [(8192, 3840), (3840, 15360), (2563, 2048)])
def test_real_shapes(columns: int, depth: int, rows: int, dtype: str) -> None:
    for flags in ({}, {"geglu": 1}, {"residual": ADD}):
        dims = {"rows": rows, "columns": columns, "depth": depth, "zeros": 0 if dtype == "bfloat16" else 1} | flags
        for chosen in (
            config(dtype, warps=4, ahead=2),
            config(dtype, tiles=2, warps=4),
            config(dtype, warps=8, ahead=2),
        ):
            check_kernel(KERNEL, Case(dtype=dtype, dims=dims), chosen)
        if dtype != "bfloat16" and rows <= 2:
            for chosen in (config(dtype, way=SPREAD, warps=4, ahead=2), config(dtype, way=SPREAD, tiles=2, warps=8)):
                check_kernel(KERNEL, Case(dtype=dtype, dims=dims), chosen)
