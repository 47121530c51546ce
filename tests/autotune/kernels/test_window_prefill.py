"""Prefill of local layers: chunks over rings, ragged batches, images, whatever lies in slots that hold nothing."""

from __future__ import annotations

import pytest
import torch

from autotune.correctness import compare
from autotune.gpu import GPUS
from autotune.kernel import Case, Config, Tensors
from autotune.kernels.prefill_attention import visible_ends_BS
from autotune.kernels.prefill_space import prefill_config
from autotune.kernels.window_prefill import WindowPrefill, window_prefill
from autotune.launch import Launch
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, H100, check_kernel
from tests.autotune.kernels.gluon_emulation import run_emulated

KERNEL = WindowPrefill()
SMALL = prefill_config(32, 16, 2, warps=2, stages=2)
HOPPER = prefill_config(128, 64, 2, warps=8, stages=2, tma=1, hopper=1, programs=2)


def case(
    chunk: int, start: int, *, window: int = 40, batch: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 16,
    images: int = 0, ragged: int = 0,
) -> Case:  # fmt: skip
    dims = {"batch": batch, "chunk": chunk, "start": start, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    return Case(dtype="bfloat16", dims=dims | {"window": window, "images": images, "ragged": ragged})


@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize(("chunk", "start"), [(1, 7), (33, 0), (70, 39), (21, 100)])
def test_holds_to_its_oracle(chunk: int, start: int, images: int, tma: int) -> None:
    check_kernel(KERNEL, case(chunk, start, images=images), prefill_config(32, 16, 2, warps=2, stages=2, tma=tma))


@pytest.mark.parametrize(("window", "start"), [(1, 77), (5, 0), (16, 3), (31, 77), (33, 32), (64, 64)])
def test_windows_that_blocks_do_not_divide(window: int, start: int) -> None:
    check_kernel(KERNEL, case(50, start, window=window, heads=2, kv_heads=1), SMALL)


@pytest.mark.parametrize(
    "config",
    [
        prefill_config(16, 32, 1, warps=1, stages=1),
        prefill_config(64, 16, 4, warps=4, stages=2, tma=1),
        prefill_config(32, 64, 2, warps=2, stages=2, mask_all=1),
        prefill_config(32, 16, 2, warps=2, stages=2, tma=1, mask_all=1),
    ],
    ids=str,
)
def test_every_kind_of_tile(config: Config) -> None:
    check_kernel(KERNEL, case(60, 61, heads=4, kv_heads=1, images=1, batch=2, ragged=1), config)


def test_a_ragged_batch() -> None:
    check_kernel(KERNEL, case(45, 60, batch=4, images=1, ragged=1), SMALL)


@pytest.mark.parametrize(
    ("chunk", "start", "batch", "images", "window"),
    [(200, 0, 1, 0, 100), (130, 30, 3, 1, 64), (150, 333, 1, 1, 64), (150, 333, 1, 0, 100)],
)
def test_the_kernel_for_hopper_keeps_its_protocol(
    chunk: int, start: int, batch: int, images: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launch, "run", run_emulated)
    shape = case(chunk, start, batch=batch, window=window, dim=128, images=images, ragged=int(batch > 1))
    inputs = KERNEL.inputs(shape, device="cpu")
    for comparison in compare(KERNEL, shape, HOPPER, inputs):
        assert comparison.passed, comparison


@pytest.mark.parametrize(("start", "tma"), [(0, 1), (9, 0), (9, 1)])
def test_nothing_that_was_not_written_is_read(start: int, tma: int) -> None:
    config = prefill_config(32, 16, 2, warps=2, stages=2, tma=tma)
    _same_with_nan(case(40, start, batch=2, heads=2, kv_heads=1, images=1, ragged=1), config)


def _same_with_nan(shape: Case, config: Config) -> None:
    inputs = KERNEL.inputs(shape, device=DEVICE)
    expected = KERNEL.run(shape, config, inputs)["out"]
    assert torch.equal(KERNEL.run(shape, config, _with_nan(inputs))["out"], expected)
    assert expected.isfinite().all()


def _with_nan(inputs: Tensors) -> Tensors:
    """NaN in slots that hold no position, and in padding rows."""
    spoilt = {name: tensor.clone() for name, tensor in inputs.items()}
    for sequence, (start, length) in enumerate(zip(inputs["start"].tolist(), inputs["length"].tolist(), strict=True)):
        for name in ("k_cache", "v_cache"):
            spoilt[name][sequence, :, start:] = float("nan")
        for name in ("q", "k", "v"):
            spoilt[name][sequence, length:] = float("nan")
    return spoilt


def test_the_visible_end_is_the_end_of_the_image() -> None:
    ids = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1], [3, 3, 4, 4, 4, -1, -1, -1]])
    assert visible_ends_BS(ids).tolist() == [[1, 4, 4, 4, 5, 6, 8, 8], [2, 2, 5, 5, 5, 6, 7, 8]]


def test_the_default_fits_every_gpu() -> None:
    for gpu in GPUS.values():
        for heads, kv_heads, dim in ((4, 1, 256), (8, 4, 256), (32, 16, 128)):
            shape = case(8192, 0, heads=heads, kv_heads=kv_heads, dim=dim, window=1024)
            assert KERNEL.refusal(shape, KERNEL.default(shape, gpu), gpu) is None


def test_what_does_not_fit_is_refused() -> None:
    shape = case(8192, 0, heads=16, kv_heads=8, dim=256, window=1024)
    for config, words in (
        (prefill_config(128, 64, 4, warps=8, stages=2), "do not divide a group of 2"),
        (prefill_config(128, 64, 2, warps=8, stages=3, tma=1), "bytes of shared memory"),
        (prefill_config(128, 64, 2, warps=4, stages=2, tma=1), "registers a thread"),
        (prefill_config(32, 16, 2, warps=4, stages=2), "4 warps need 64 rows"),
        (prefill_config(64, 16, 2, warps=4, stages=2, programs=132), "is for the kernel for Hopper"),
    ):
        assert words in str(KERNEL.refusal(shape, config, H100))
    for name, words in (("a100", "needs compute capability 9.0"), ("h100", "interpreter")):
        assert words in str(KERNEL.refusal(shape, HOPPER, GPUS[name]))


def test_the_launcher_says_what_does_not_fit() -> None:
    inputs = KERNEL.inputs(case(20, 5), device=DEVICE)
    given = [inputs[name] for name in ("q", "k", "v", "k_cache", "v_cache", "start", "length")]
    out = window_prefill(*given, scale=0.25, config=SMALL)
    assert torch.equal(out, KERNEL.run(case(20, 5), SMALL, inputs)["out"])
    with pytest.raises(UsageError, match=r"start must be torch\.int32, but is torch\.int64"):
        window_prefill(*given[:5], given[5].long(), given[6], scale=0.25)
    with pytest.raises(UsageError, match=r"v_cache must have the shape \(1, 2, 40, 16\), but has \(1, 2, 39, 16\)"):
        window_prefill(*given[:4], given[4][:, :, 1:], *given[5:], scale=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        None,
        prefill_config(128, 64, 2, warps=8, stages=2, tma=1),
        prefill_config(128, 64, 2, warps=8, stages=2),
        prefill_config(64, 32, 2, warps=4, stages=2, mask_all=1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("chunk", "start", "batch", "images"), [(2048, 0, 1, 0), (1000, 5000, 1, 1), (1537, 700, 3, 2), (1, 900, 1, 0)]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"), [(4, 1, 256, 512), (16, 8, 256, 1024), (32, 16, 128, 1024)]
)
def test_real_shapes(
    heads: int, kv_heads: int, dim: int, window: int, chunk: int, start: int, batch: int, images: int,
    config: Config | None,
) -> None:  # fmt: skip
    shape = case(
        chunk, start, window=window, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, images=images, ragged=1
    )
    check_kernel(KERNEL, shape, config)


@pytest.mark.gpu
@pytest.mark.parametrize("start", [0, 100])
def test_real_shapes_with_nan(start: int) -> None:
    shape = case(700, start, batch=2, heads=16, kv_heads=8, dim=256, window=1024, images=1, ragged=1)
    _same_with_nan(shape, KERNEL.default(shape, H100))
