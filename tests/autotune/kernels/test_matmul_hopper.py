"""The products for Hopper: their protocol without a GPU, what they compile to, and what they refuse."""

from __future__ import annotations

import pytest
import triton

from autotune.ahead_of_time import compile_launch
from autotune.correctness import compare
from autotune.gpu import GPUS
from autotune.kernel import Case, Config
from autotune.kernels import matmul_hopper, matmul_hopper_square
from autotune.kernels.matmul import Matmul
from autotune.launch import Launch
from tests.autotune.checked import H100, check_kernel
from tests.autotune.kernels.matmul_emulation import run_emulated

KERNEL = Matmul()


def case(rows: int, columns: int, depth: int, flags: str = "", *, dtype: str = "bfloat16") -> Case:
    dims = {"rows": rows, "columns": columns, "depth": depth} | dict.fromkeys(flags.split(), 1)
    return Case(dtype=dtype, dims=dims)


def config(
    block: tuple[int, int, int] = (128, 256, 64), *, programs: int = 0, stages: int = 4, ahead: int | None = None
) -> Config:
    constants = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    constants |= {"LOADS": 2, "PROGRAMS": programs, "GROUP": 2, "PARTS": 1}
    if ahead is not None:
        constants["AHEAD"] = ahead
    return Config(constants=constants, num_warps=8, num_stages=stages)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (case(300, 520, 200), config(programs=2)),
        (case(300, 520, 40, "bias gelu residual"), config(programs=2, stages=3)),
        (case(200, 264, 360, "geglu"), config((128, 128, 64), programs=3)),
        (case(200, 72, 104, "bias geglu residual"), config((128, 64, 64), programs=2, stages=5)),
        (case(400, 264, 200), config((192, 192, 64), programs=4)),
        (case(200, 200, 72, "bias gelu residual"), config((192, 192, 64), stages=3)),
        (case(520, 136, 200, "bias"), config((256, 128, 64))),
    ],
    ids=str,
)
def test_the_protocol_holds(wanted: Case, chosen: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", run_emulated)
    for comparison in compare(KERNEL, wanted, chosen, KERNEL.inputs(wanted, device="cpu")):
        assert comparison.passed, comparison


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (case(8192, 4096, 2560), config(programs=132)),
        (case(8192, 10240, 2560, "geglu"), config((128, 128, 64), programs=132)),
        (case(8192, 3840, 4096), config((256, 128, 64), programs=132)),
        (case(4096, 1152, 4304, "bias residual"), config((192, 192, 64))),
    ],
    ids=str,
)
def test_compiles_without_spills_and_fits(wanted: Case, chosen: Config) -> None:
    tensors = KERNEL.inputs(wanted, device="meta") | KERNEL.outputs(wanted, chosen, device="meta")
    (launch,) = KERNEL.launches(wanted, chosen, tensors)
    compiled = compile_launch(launch, 90)
    block_m, block_n = chosen.constants["BLOCK_M"], chosen.constants["BLOCK_N"]
    width = block_n * (2 if wanted.dims.get("geglu") else 1)
    shared = matmul_hopper.shared_bytes(block_m, block_n, width, chosen.num_stages)
    if block_m == matmul_hopper_square.SIDE:
        shared = matmul_hopper_square.shared_bytes(chosen.num_stages)
    assert compiled.shared_bytes <= shared <= H100.shared_bytes
    assert compiled.spill_bytes == 0
    assert compiled.registers * compiled.num_warps * 32 <= 65536


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = case(8192, 2560, 2048)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert "interpreter" in str(KERNEL.refusal(wanted, config(), H100))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert KERNEL.refusal(wanted, config(programs=132), H100) is None
    for name in ("a100", "b200", "rtx5090"):
        assert "needs compute capability 9.0" in str(KERNEL.refusal(wanted, config(), GPUS[name]))
    for refused, chosen, words in (
        (wanted, config(stages=5), "bytes of shared memory"),
        (wanted, config((256, 256, 64)), "no tile of 256 rows and 256 sums"),
        (wanted, config((192, 128, 64)), "tiles of 192 rows are square"),
        (wanted, config((128, 256, 32)), "is BLOCK_K=64 PARTS=1 warps=8"),
        (wanted, config(programs=114), "as many multiprocessors"),
        (case(512, 2560, 2048), config(programs=132), "needs more tiles (40)"),
        (case(8192, 2560, 2048, "geglu"), config((192, 192, 64)), "without GeGLU"),
        (case(8192, 2560, 2048, "transposed"), config(), "needs weights [N, K]"),
        (case(8192, 2564, 2048), config(), "multiples of 8"),
        (case(8192, 2560, 2048, dtype="int4"), config(ahead=0), "need AHEAD 1"),
    ):
        assert words in str(KERNEL.refusal(refused, chosen, H100))


def test_the_heuristic_takes_them_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for wanted, block, programs in (
        (case(8192, 4096, 2560), (128, 256), 132),
        (case(8192, 10240, 2560, "geglu"), (128, 128), 132),
        (case(8192, 10240, 2560, "geglu", dtype="int4"), (128, 128), 132),
        (case(512, 4096, 2560), (128, 128), 0),
        (case(4096, 1152, 4304, "bias residual"), (192, 192), 0),
    ):
        chosen = KERNEL.default(wanted, H100)
        assert KERNEL.refusal(wanted, chosen, H100) is None
        constants = chosen.constants
        assert (constants["LOADS"], constants["BLOCK_M"], constants["BLOCK_N"], constants["PROGRAMS"]) == (
            2,
            *block,
            programs,
        )
        for name, values in KERNEL.space(wanted).constants.items():
            assert constants[name] in values
        assert chosen.num_stages in KERNEL.space(wanted).num_stages
    assert KERNEL.default(case(33, 4096, 2560, "transposed"), H100).constants["LOADS"] == 1
    assert KERNEL.default(case(8192, 4096, 2560), GPUS["b200"]).constants["LOADS"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ["", "bias gelu", "geglu", "bias geglu residual", "bias residual"])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 8, 8), (130, 264, 40), (3000, 2576, 200), (8192, 2560, 2048)]
)
@pytest.mark.parametrize("block", [(128, 256), (256, 128), (128, 128), (192, 192)])
def test_real_shapes(block: tuple[int, int], rows: int, columns: int, depth: int, flags: str) -> None:
    wanted = case(rows, columns, depth, flags)
    block_n = block[1] // 2 if "geglu" in flags else block[1]
    for programs in (0, H100.multiprocessors):
        chosen = config((block[0], block_n, 64), programs=programs)
        if KERNEL.refusal(wanted, chosen, H100) is None:
            check_kernel(KERNEL, wanted, chosen)
