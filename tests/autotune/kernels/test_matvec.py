"""Products of few rows, with everything that may stand beside them, in every format and on odd shapes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from autotune.gpu import GPUS
from autotune.kernel import Case, Config
from autotune.kernels.matvec import Matvec, matvec, matvec_blocks, matvec_oracle
from autotune.kernels.matvec_space import ADD, POST_NORM, row_of
from autotune.model_shapes import ModelShapes
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, H100, check_kernel

KERNEL = Matvec()
FMA = {"DOT": 0, "BLOCK_N": 4, "BLOCK_K": 512, "LOOP": 1, "SPLIT": 1, "DEPENDENT": 1}
DOT = {"DOT": 1, "BLOCK_N": 16, "BLOCK_K": 64, "LOOP": 1, "SPLIT": 1, "DEPENDENT": 1}


def case(dtype: str = "bfloat16", *, rows: int = 1, columns: int = 7, depth: int = 96, **flags: int) -> Case:
    return Case(dtype=dtype, dims={"rows": rows, "columns": columns, "depth": depth, **flags})


def config(warps: int = 1, stages: int = 1, base: dict[str, int] = FMA, **constants: int) -> Config:
    return Config(constants=base | constants, num_warps=warps, num_stages=stages)


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 11, 16])
def test_every_batch(rows: int, dtype: str) -> None:
    check_kernel(KERNEL, case(dtype, rows=rows))


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("units", [FMA, DOT])
@pytest.mark.parametrize(("norm", "geglu", "residual"), [*product((0, 1), (0, 1), (0, ADD, POST_NORM))])
def test_every_option(norm: int, geglu: int, residual: int, units: dict[str, int], dtype: str) -> None:
    flags = {"norm": norm, "geglu": geglu, "residual": residual, "fp32": norm ^ geglu}
    chosen = config(base=units, BLOCK_K=256 if units is FMA else 64)
    check_kernel(KERNEL, case(dtype, rows=2, depth=160, columns=37, **flags), chosen)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("units", [FMA, DOT])
@pytest.mark.parametrize(("zeros", "scale_bits"), [(0, 32), (1, 32), (2, 32), (1, 16)])
def test_every_grid(zeros: int, scale_bits: int, units: dict[str, int], dtype: str) -> None:
    """Depth 352 has eleven blocks: half of the last byte of zeros is nobody's."""
    odd = case(dtype, rows=2, depth=352, zeros=zeros, scale_bits=scale_bits)
    check_kernel(KERNEL, odd, config(base=units))


@pytest.mark.parametrize("depth", [1, 37, 100, 514])
@pytest.mark.parametrize("units", [FMA, DOT])
def test_bf16_takes_any_depth(depth: int, units: dict[str, int]) -> None:
    block = 1 << max(6, (depth - 1).bit_length() - 1)
    check_kernel(KERNEL, case(depth=depth, norm=1), config(base=units, BLOCK_K=min(block, 256)))


@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize(
    "chosen",
    [
        config(BLOCK_K=1024, LOOP=4, BLOCK_N=2),
        config(BLOCK_K=1024, LOOP=2, BLOCK_N=4, warps=2),
        config(BLOCK_K=256, BLOCK_N=8, stages=3),
        config(BLOCK_K=256, SPLIT=3, LOOP=2),
        config(BLOCK_K=128, SPLIT=2, BLOCK_N=16),
        config(base=DOT, SPLIT=4),
        config(base=DOT, BLOCK_K=128, stages=3, warps=2, BLOCK_N=32),
    ],
    ids=str,
)
def test_every_way_through_the_depth(chosen: Config, dtype: str) -> None:
    check_kernel(KERNEL, case(dtype, depth=672, norm=1, geglu=1, residual=POST_NORM), chosen)


def test_counters_are_left_at_zero() -> None:
    shape = case(rows=2, depth=160, residual=POST_NORM)
    chosen = config(BLOCK_K=64, SPLIT=3, LOOP=2)
    inputs = KERNEL.inputs(shape, device=DEVICE)
    written = KERNEL.outputs(shape, chosen, device=DEVICE)
    (launch,) = KERNEL.launches(shape, chosen, inputs | written)
    results = []
    for _ in range(3):
        launch.run()
        results.append(written["y"].clone())
        assert int(written["_zero_counters"].abs().max()) == 0
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("bits", [4, 8])
def test_large_and_small_activations_keep_their_precision(bits: int) -> None:
    """The powers of two that codes carry must not carry activations out of fp32."""
    shape = case(f"int{bits}", rows=4, zeros=1)
    inputs = KERNEL.inputs(shape, device=DEVICE)
    inputs["x"] *= torch.tensor([1e-6, 1e-3, 1e3, 1e5], device=DEVICE)[:, None].bfloat16()
    y = KERNEL.run(shape, config(), inputs)["y"].double()
    exact = KERNEL.oracle(shape, {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()})["y"]
    assert float(((y - exact).abs() / exact.abs().amax(1, keepdim=True)).max()) < 2**-7


def test_the_launchers_compute_what_the_oracle_says() -> None:
    draw = {"generator": torch.Generator(device=DEVICE).manual_seed(0), "device": DEVICE}
    x = torch.randn(2, 64, **draw).bfloat16()  # type: ignore[call-overload]
    w = torch.randn(10, 64, **draw).bfloat16()  # type: ignore[call-overload]
    h = torch.randn(2, 5, **draw).bfloat16()  # type: ignore[call-overload]
    norm, post = torch.full((64,), 1.25, device=DEVICE), torch.full((5,), 0.75, device=DEVICE)
    actual = matvec(x, w, norm_K=norm, geglu=True, h_MF=h, post_F=post, fp32=True)
    exact = matvec_oracle(x.float(), w.float(), norm_K=norm, geglu=True, h_MF=h.float(), post_F=post)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, exact, rtol=0.03, atol=0.03)
    codes = torch.randint(0, 256, (10, 32), dtype=torch.uint8, **draw)  # type: ignore[call-overload]
    scales = torch.full((10, 2), 0.125, device=DEVICE)
    zeros = torch.full((10, 1), 0x37, dtype=torch.uint8, device=DEVICE)
    actual = matvec_blocks(x, codes, scales, bits=4, zeros_NP=zeros, fp32=True)
    even, odd = codes & 15, codes >> 4
    values = torch.stack([even, odd], 2).reshape(10, 2, 32).float() - torch.tensor([7.0, 3.0], device=DEVICE)[:, None]
    exact = x.float() @ (values * 0.125).reshape(10, 64).T
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)


def test_the_launchers_say_what_does_not_fit() -> None:
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE)
    w = torch.zeros(8, 64, dtype=torch.bfloat16, device=DEVICE)
    codes = torch.zeros(8, 32, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(8, 2, device=DEVICE)
    with pytest.raises(UsageError, match=r"w must have the shape \(8, 64\), but has \(8, 63\)"):
        matvec(x, w[:, :63])
    with pytest.raises(UsageError, match="16 rows at most, but x has 17"):
        matvec(x[:1].expand(17, 64).contiguous(), w)
    with pytest.raises(UsageError, match="h is missing"):
        matvec(x, w, post_F=torch.zeros(8, device=DEVICE))
    with pytest.raises(UsageError, match=r"zeros must have the shape \(8, 1\), but has \(8, 2\)"):
        matvec_blocks(x, codes, scales, bits=4, zeros_NP=torch.zeros(8, 2, dtype=torch.uint8, device=DEVICE))
    with pytest.raises(UsageError, match="zeros or minimums, but both"):
        matvec_blocks(x, codes, scales, bits=4, zeros_NP=codes[:, :1].contiguous(), minimums_Nn=scales)
    with pytest.raises(UsageError, match="32 divides, but x has 48"):
        matvec_blocks(x[:, :48].contiguous(), codes, scales, bits=4)
    with pytest.raises(UsageError, match="matvec cannot run"):
        matvec(x, w, config=config(LOOP=4, BLOCK_K=32))


def test_a_decode_step_is_all_there() -> None:
    model = ModelShapes(
        name="4b", hidden=2560, ffn=10240, heads=8, kv_heads=4, head_dim=256,
        query_pre_attn_scalar=256, vocab=262208, window=1024, local_layers=29, global_layers=5, vision=None,
    )  # fmt: skip
    uses = KERNEL.uses(model, "decode", batch=1, context=1000, dtype="bfloat16")
    weights = sum(use.count * row_of(use.case).weight_rows * use.case.dims["depth"] for use in uses)
    assert weights == 34 * (2560 * (4096 + 2048) + 3 * 2560 * 10240) + 262208 * 2560
    (head,) = KERNEL.uses(model, "prefill", batch=1, context=1000, dtype="bfloat16")
    assert (head.name, head.count) == ("head", 1)
    assert KERNEL.uses(model, "vision", batch=1, context=1, dtype="bfloat16") == ()
    assert KERNEL.uses(model, "decode", batch=17, context=1000, dtype="bfloat16") == ()


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("dtype", KERNEL.dtypes)
def test_the_heuristic_fits_every_gpu(dtype: str, gpu: object) -> None:
    for rows, (columns, depth), geglu in product((1, 2, 4, 8, 16), [(640, 1024), (15360, 3840), (5376, 21504)], (0, 1)):
        shape = case(dtype, rows=rows, columns=columns, depth=depth, geglu=geglu)
        chosen = KERNEL.default(shape, gpu)  # type: ignore[arg-type]
        refused = KERNEL.refusal(shape, chosen, gpu)  # type: ignore[arg-type]
        assert refused is None, f"{shape}: {chosen}: {refused}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("columns", "depth"), [(8192, 3840), (3840, 15360), (640, 2048), (15360, 3840)])
def test_real_shapes(columns: int, depth: int, rows: int, dtype: str) -> None:
    for flags in ({}, {"norm": 1, "geglu": 1}, {"residual": POST_NORM}):
        shape = case(dtype, rows=rows, columns=columns, depth=depth, zeros=0 if dtype == "bfloat16" else 1, **flags)
        for chosen in (KERNEL.default(shape, H100), config(base=DOT, BLOCK_K=256, SPLIT=3, warps=4, stages=3)):
            check_kernel(KERNEL, shape, chosen)
