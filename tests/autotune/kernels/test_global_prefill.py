"""Prefill of global layers: chunks over linear caches, ragged batches, images, whatever lies past the end."""

from __future__ import annotations

import pytest
import torch

from autotune.correctness import compare
from autotune.gpu import GPUS
from autotune.kernel import Case, Config, Tensors
from autotune.kernels.global_prefill import GlobalPrefill, global_prefill
from autotune.kernels.prefill_space import prefill_config
from autotune.launch import Launch
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, H100, check_kernel
from tests.autotune.kernels.gluon_emulation import run_emulated

KERNEL = GlobalPrefill()
SMALL = prefill_config(32, 16, 2, warps=2, stages=2)
HOPPER = prefill_config(128, 64, 2, warps=8, stages=2, tma=1, hopper=1, programs=3)


def case(
    chunk: int, start: int, *, slots: int = 150, batch: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 16,
    images: int = 0, ragged: int = 0,
) -> Case:  # fmt: skip
    dims = {"batch": batch, "chunk": chunk, "start": start, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    return Case(dtype="bfloat16", dims=dims | {"slots": slots, "images": images, "ragged": ragged})


@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize(("chunk", "start"), [(1, 70), (33, 0), (70, 39)])
def test_holds_to_its_oracle(chunk: int, start: int, images: int, tma: int) -> None:
    check_kernel(KERNEL, case(chunk, start, images=images), prefill_config(32, 16, 2, warps=2, stages=2, tma=tma))


@pytest.mark.parametrize(
    "config",
    [
        prefill_config(16, 32, 1, warps=1, stages=1),
        prefill_config(64, 16, 4, warps=4, stages=2, tma=1),
        prefill_config(32, 64, 2, warps=2, stages=2, mask_all=1),
    ],
    ids=str,
)
def test_every_kind_of_tile(config: Config) -> None:
    check_kernel(KERNEL, case(61, 40, heads=4, kv_heads=1, images=1, batch=2, ragged=1), config)


def test_a_ragged_batch() -> None:
    check_kernel(KERNEL, case(45, 60, batch=4, images=1, ragged=1), SMALL)


@pytest.mark.parametrize(
    ("chunk", "start", "batch", "images"), [(200, 0, 1, 0), (130, 30, 3, 1), (90, 333, 1, 1), (90, 333, 1, 0)]
)
def test_the_kernel_for_hopper_keeps_its_protocol(
    chunk: int, start: int, batch: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launch, "run", run_emulated)
    shape = case(chunk, start, batch=batch, slots=450, dim=128, images=images, ragged=int(batch > 1))
    for comparison in compare(KERNEL, shape, HOPPER, KERNEL.inputs(shape, device="cpu")):
        assert comparison.passed, comparison


@pytest.mark.parametrize("tma", [0, 1])
def test_nothing_that_was_not_written_is_read(tma: int) -> None:
    config = prefill_config(32, 16, 2, warps=2, stages=2, tma=tma)
    _same_with_nan(case(40, 9, batch=3, heads=2, kv_heads=1, images=1, ragged=1), config)


def _same_with_nan(shape: Case, config: Config) -> None:
    inputs = KERNEL.inputs(shape, device=DEVICE)
    expected = KERNEL.run(shape, config, inputs)["out"]
    assert torch.equal(KERNEL.run(shape, config, _with_nan(inputs))["out"], expected)
    assert expected.isfinite().all()


def _with_nan(inputs: Tensors) -> Tensors:
    """NaN in slots past the end, and in padding rows."""
    spoilt = {name: tensor.clone() for name, tensor in inputs.items()}
    for sequence, (start, length) in enumerate(zip(inputs["start"].tolist(), inputs["length"].tolist(), strict=True)):
        for name in ("k_cache", "v_cache"):
            spoilt[name][sequence, :, start + length :] = float("nan")
        spoilt["q"][sequence, length:] = float("nan")
    return spoilt


def test_the_default_fits_every_gpu() -> None:
    for gpu in GPUS.values():
        for heads, kv_heads, dim in ((4, 1, 256), (8, 4, 256), (32, 16, 128)):
            shape = case(8192, 0, heads=heads, kv_heads=kv_heads, dim=dim, slots=8192)
            assert KERNEL.refusal(shape, KERNEL.default(shape, gpu), gpu) is None


def test_the_launcher_says_what_does_not_fit() -> None:
    inputs = KERNEL.inputs(case(20, 5), device=DEVICE)
    given = [inputs[name] for name in ("q", "k_cache", "v_cache", "start", "length")]
    out = global_prefill(*given, scale=0.25, config=SMALL)
    assert torch.equal(out, KERNEL.run(case(20, 5), SMALL, inputs)["out"])
    with pytest.raises(UsageError, match="a chunk of 20 tokens cannot be in a cache of 19 slots"):
        global_prefill(given[0], *(c[:, :, :19].contiguous() for c in given[1:3]), *given[3:], scale=0.25)
    with pytest.raises(UsageError, match="head_dim must be one of 16, 32, 64, 128, 256, but is 8"):
        global_prefill(*(t[..., :8] for t in given[:3]), *given[3:], scale=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        None,
        prefill_config(128, 64, 2, warps=8, stages=2, tma=1),
        prefill_config(64, 32, 2, warps=4, stages=2, mask_all=1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("chunk", "start", "batch", "images"), [(2048, 0, 1, 0), (1000, 5000, 1, 1), (1537, 700, 3, 2), (1, 900, 1, 0)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 256), (16, 8, 256), (32, 16, 128)])
def test_real_shapes(
    heads: int, kv_heads: int, dim: int, chunk: int, start: int, batch: int, images: int, config: Config | None
) -> None:
    shape = case(
        chunk, start, slots=8192, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, images=images, ragged=1
    )
    check_kernel(KERNEL, shape, config)


@pytest.mark.gpu
def test_real_shapes_with_nan() -> None:
    shape = case(700, 100, batch=2, heads=16, kv_heads=8, dim=256, slots=1024, images=1, ragged=1)
    _same_with_nan(shape, KERNEL.default(shape, H100))
