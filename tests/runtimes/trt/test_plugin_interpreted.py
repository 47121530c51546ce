"""The plugins' ``enqueue`` where there is no GPU: what it launches, run by Triton's interpreter, against the oracles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotune.correctness import Expectation
from autotune.kernel import Case, Tensors
from autotune.kernels.siglip_pool import siglip_pool
from autotune.kernels.window_prefill import WindowPrefill
from graphs.trt.kernels import write_kernels
from runtimes.errors import BundleError
from runtimes.gpu.kernel_store import KernelStore
from runtimes.trt import take_failure
from tests.runtimes.gpu.interpreted import InterpretedDevice, interpreted
from tests.runtimes.trt.driving import Driven, check_window, drive, pool_plugin, scale_of, shapes, window_call

MODEL = shapes(4, 2, 32, 16, scalar=24, patches=16, tokens=4, vision_hidden=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kernels")
    write_kernels(made, MODEL, [80], max_batch=3, chunk=64, max_images=2)
    return made


@pytest.fixture
def store(folder: Path) -> KernelStore:
    return KernelStore.open(folder)


@pytest.fixture
def device(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> InterpretedDevice:
    return interpreted(store, 80, monkeypatch)


def chunk_of(chunk: int, start: int, *, batch: int = 1, images: int = 0) -> Tensors:
    dims = {"batch": batch, "chunk": chunk, "start": start, "heads": 4, "kv_heads": 2, "head_dim": 32, "window": 16}
    return WindowPrefill().inputs(Case(dtype="bfloat16", dims=dims | {"images": images, "ragged": 1}), device="cpu")


def call_of(store: KernelStore, device: InterpretedDevice, tensors: Tensors) -> Driven:
    call = window_call(store, tensors, scale_of(MODEL))
    device.memory += [*call.inputs, *call.outputs, call.workspace]
    return call


@pytest.mark.parametrize(
    ("chunk", "start", "batch", "images"),
    [(2, 0, 1, 0), (64, 0, 1, 0), (33, 100, 1, 0), (20, 9, 3, 1), (1, 0, 1, 0), (1, 15, 1, 0), (1, 1000, 3, 0)],
)
def test_window(store: KernelStore, device: InterpretedDevice, chunk: int, start: int, batch: int, images: int) -> None:
    tensors = chunk_of(chunk, start, batch=batch, images=images)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    call = call_of(store, device, tensors)
    for _ in range(2 if chunk == 1 else 1):  # a token written twice is the same; counters must be zeros again
        call.outputs[0].fill_(float("nan"))
        call.enqueue()
        check_window(MODEL, before, call)


def test_what_is_launched_in_which_order(store: KernelStore, device: InterpretedDevice) -> None:
    for chunk in (1, 40):
        call_of(store, device, chunk_of(chunk, 3, batch=3)).enqueue()
    assert [symbol for symbol, _ in device.launched] == [
        "_cache_write_kernel",
        "_decode_attention_kernel",
        "_window_prefill_kernel",
        "_cache_write_kernel",
    ]


def test_pooling(store: KernelStore, device: InterpretedDevice) -> None:
    x, scale = torch.randn(2, 16, 48).to(torch.bfloat16), 1 + 0.25 * torch.randn(48)
    y = torch.full((2, 4, 48), float("nan"), dtype=torch.bfloat16)
    call = drive(pool_plugin(store, 2, 1e-6), [x, scale], [y])
    device.memory += [*call.inputs, *call.outputs]
    call.enqueue()
    exact, plain = (siglip_pool(x.to(dtype), scale, 2, 1e-6) for dtype in (torch.float32, torch.bfloat16))
    assert Expectation.of(exact, plain).compare("y", y).passed


def test_what_a_plugin_raises_is_kept(store: KernelStore, device: InterpretedDevice) -> None:
    take_failure()
    call = call_of(store, device, chunk_of(1, 3))
    apart = (call.outputs[0], call.outputs[1].clone(), call.outputs[2])
    with pytest.raises(BundleError) as caught:
        Driven(plugin=call.plugin, inputs=call.inputs, outputs=apart, workspace=call.workspace).enqueue()
    assert "k_cache_out and k_cache must have one address" in str(caught.value)
    assert take_failure() is caught.value
    assert take_failure() is None


def test_a_shape_that_was_not_compiled(store: KernelStore, device: InterpretedDevice) -> None:
    tensors = chunk_of(4, 0)
    tensors["q"] = torch.zeros(1, 4, 8, 32, dtype=torch.bfloat16)
    with pytest.raises(BundleError, match=r"q is \(1, 4, 8, 32\), but window_prefill was compiled for \(1, 4, 4, 32\)"):
        window_call(store, tensors, 1.0)
    with pytest.raises(BundleError, match=r"made for `1 <= S <= 64`, but got 65"):
        window_call(store, chunk_of(65, 0), 1.0)


def test_a_plugin_of_a_builder_launches_nothing(store: KernelStore, device: InterpretedDevice) -> None:
    call = call_of(store, device, chunk_of(1, 3))
    call.plugin._building = True
    call.enqueue()
    call.plugin.attach_to_context(None).on_shape_change([], [])
    assert device.launched == []
