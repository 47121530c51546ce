"""The plugins' ``enqueue`` on a GPU, called as TensorRT would: against the oracles, alone and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autotune.correctness import Expectation
from autotune.gpu import present
from autotune.kernel import Case, Tensors
from autotune.kernels.siglip_pool import siglip_pool
from autotune.kernels.window_prefill import WindowPrefill
from autotune.model_shapes import ModelShapes
from graphs.trt.kernels import write_kernels
from runtimes.errors import BundleError
from runtimes.gpu.kernel_store import KernelStore
from tests.runtimes.trt.driving import (
    Driven,
    check_window,
    descriptors,
    drive,
    pool_plugin,
    scale_of,
    shapes,
    window_call,
    window_plugin,
)

pytestmark = pytest.mark.gpu

MODELS = {
    "270m": shapes(4, 1, 256, 512, vision=False),
    "4b": shapes(8, 4, 256, 1024),
    "27b": shapes(32, 16, 128, 1024, scalar=168),
}
CHUNK, BATCH, IMAGES = 2048, 3, 4
GetStore = Callable[[str], KernelStore]


@pytest.fixture(scope="module")
def store_of(tmp_path_factory: pytest.TempPathFactory) -> GetStore:
    """Kernels of this GPU, compiled once for each model."""
    stores: dict[str, KernelStore] = {}

    def get(name: str) -> KernelStore:
        if name not in stores:
            folder: Path = tmp_path_factory.mktemp(name)
            architectures = [present().architecture]
            write_kernels(folder, MODELS[name], architectures, max_batch=BATCH, chunk=CHUNK, max_images=IMAGES)
            stores[name] = KernelStore.open(folder)
        return stores[name]

    return get


def chunk_of(model: ModelShapes, chunk: int, start: int, *, batch: int = 1, images: int = 0) -> Tensors:
    dims = {"batch": batch, "chunk": chunk, "start": start, "heads": model.heads, "kv_heads": model.kv_heads}
    dims |= {"head_dim": model.head_dim, "window": model.window, "images": images, "ragged": 1}
    return WindowPrefill().inputs(Case(dtype="bfloat16", dims=dims), device="cuda", seed=chunk + start)


def run(model: ModelShapes, store: KernelStore, tensors: Tensors) -> None:
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    call = window_call(store, tensors, scale_of(model))
    call.enqueue()
    torch.cuda.synchronize()
    check_window(model, before, call)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", [0, 300, 5000])
@pytest.mark.parametrize("chunk", [2, 3, 63, 64, 65, 500, 1025, 2048])
def test_chunks(store_of: GetStore, name: str, chunk: int, start: int) -> None:
    run(MODELS[name], store_of(name), chunk_of(MODELS[name], chunk, start))


@pytest.mark.parametrize("name", ["4b", "27b"])
@pytest.mark.parametrize(("chunk", "start", "batch", "images"), [(600, 0, 1, 1), (2048, 700, 1, 3), (1100, 5000, 3, 2)])
def test_chunks_with_pictures(store_of: GetStore, name: str, chunk: int, start: int, batch: int, images: int) -> None:
    run(MODELS[name], store_of(name), chunk_of(MODELS[name], chunk, start, batch=batch, images=images))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [2, 700])
def test_a_ragged_batch_with_an_idle_sequence(store_of: GetStore, name: str, chunk: int) -> None:
    tensors = chunk_of(MODELS[name], chunk, 5000, batch=BATCH)
    assert tensors["length"].tolist()[-1] == 0
    run(MODELS[name], store_of(name), tensors)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wraps", [0, 1, 5])
@pytest.mark.parametrize("offset", [-1, 0, 1, 37])
def test_one_token_around_the_wrap(store_of: GetStore, name: str, wraps: int, offset: int) -> None:
    model = MODELS[name]
    run(model, store_of(name), chunk_of(model, 1, max(wraps * model.window + offset, 0)))


@pytest.mark.parametrize("name", MODELS)
def test_one_token_of_each_sequence_and_one_idle(store_of: GetStore, name: str) -> None:
    model = MODELS[name]
    tensors = chunk_of(model, 1, 3 * model.window, batch=BATCH)
    tensors["start"].copy_(torch.tensor([3 * model.window, 5, model.window - 1]))
    tensors["length"].copy_(torch.tensor([1, 1, 0]))
    run(model, store_of(name), tensors)


def test_an_idle_sequence_that_is_empty_gives_zeros(store_of: GetStore) -> None:
    model = MODELS["4b"]
    tensors = chunk_of(model, 1, 0)
    tensors["length"].zero_()
    call = window_call(store_of("4b"), tensors, scale_of(model))
    call.enqueue()
    torch.cuda.synchronize()
    assert call.outputs[0].count_nonzero() == 0


def capture(call: Driven) -> torch.cuda.CUDAGraph:
    """As a session does: nothing was launched by this plugin before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.enqueue()
    return graph


@pytest.mark.parametrize("name", MODELS)
def test_decode_in_a_cuda_graph_whose_position_moves(store_of: GetStore, name: str) -> None:
    model = MODELS[name]
    tensors = chunk_of(model, 1, model.window - 2)
    call = window_call(store_of(name), tensors, scale_of(model))
    graph = capture(call)
    for step in range(4):  # past the wrap
        before = {key: tensor.clone() for key, tensor in tensors.items()}
        call.outputs[0].fill_(float("nan"))
        call.workspace.fill_(255)
        graph.replay()
        torch.cuda.synchronize()
        check_window(model, before, call)
        tensors["start"].add_(1)
        call.inputs[7].add_(1)  # newest
        for key in ("q", "k", "v"):
            tensors[key].copy_(torch.randn(tensors[key].shape, device="cuda").to(torch.bfloat16) + 0.1 * step)


@pytest.mark.parametrize("name", MODELS)
def test_a_chunk_in_a_cuda_graph(store_of: GetStore, name: str) -> None:
    model = MODELS[name]
    tensors = chunk_of(model, 300, 900)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    call = window_call(store_of(name), tensors, scale_of(model))
    capture(call).replay()
    torch.cuda.synchronize()
    check_window(model, before, call)


def test_one_plugin_changes_shapes_and_back(store_of: GetStore) -> None:
    """A prompt in two chunks and three tokens, through one plugin, as one long chunk by the oracle."""
    model, store = MODELS["4b"], store_of("4b")
    whole = chunk_of(model, 1403, 0)
    call = window_call(store, {key: tensor.clone() for key, tensor in whole.items()}, scale_of(model))
    outs, at = [], 0
    for size in (800, 600, 1, 1, 1):
        part = {key: whole[key][:, at : at + size].contiguous() for key in ("q", "k", "v")}
        start, length = (torch.tensor([n], dtype=torch.int32, device="cuda") for n in (at, size))
        ends = torch.arange(1, size + 1, dtype=torch.int32, device="cuda")[None]
        inputs = (part["q"], part["k"], part["v"], *call.inputs[3:5], start, length, start + length - 1, ends)
        outputs = (torch.empty_like(part["q"]), *call.inputs[3:5])
        step = Driven(plugin=call.plugin, inputs=inputs, outputs=outputs, workspace=call.workspace)
        step.plugin.on_shape_change(descriptors(inputs), descriptors(outputs))
        step.enqueue()
        outs.append(outputs[0])
        at += size
    torch.cuda.synchronize()
    joined = Driven(
        plugin=call.plugin,
        inputs=call.inputs,
        outputs=(torch.cat(outs, 1), *call.inputs[3:5]),
        workspace=call.workspace,
    )
    check_window(model, whole, joined)


@pytest.mark.parametrize("images", [1, IMAGES])
def test_pooling(store_of: GetStore, images: int) -> None:
    store = store_of("4b")
    x = torch.randn(images, 4096, 1152, device="cuda").mul_(3).to(torch.bfloat16)
    scale = 1 + 0.25 * torch.randn(1152, device="cuda")
    y = torch.full((images, 256, 1152), float("nan"), dtype=torch.bfloat16, device="cuda")
    call = drive(pool_plugin(store, 4, 1e-6), [x, scale], [y])
    exact, plain = (siglip_pool(x.to(dtype), scale, 4, 1e-6) for dtype in (torch.float32, torch.bfloat16))
    for launch in (call.enqueue, capture(call).replay):
        y.fill_(float("nan"))
        launch()
        torch.cuda.synchronize()
        comparison = Expectation.of(exact, plain).compare("y", y)
        assert comparison.passed, comparison


def test_what_was_not_compiled_is_told(store_of: GetStore) -> None:
    model, store = MODELS["4b"], store_of("4b")
    with pytest.raises(BundleError, match=r"made for `1 <= S <= 2048`, but got 2049"):
        window_call(store, chunk_of(model, 2049, 0), scale_of(model))
    with pytest.raises(BundleError, match=r"k is \(1, 1, 1, 256\), but cache_write was compiled for \(1, 1, 4, 256\)"):
        window_call(store, chunk_of(MODELS["270m"], 1, 0), scale_of(model))
    call = window_call(store, chunk_of(model, 1, 0), scale_of(model))
    apart = (call.outputs[0], call.outputs[1].clone(), call.outputs[2])
    with pytest.raises(BundleError, match="k_cache_out and k_cache must have one address"):
        Driven(plugin=call.plugin, inputs=call.inputs, outputs=apart, workspace=call.workspace).enqueue()


def test_many_contexts_of_one_plan_have_counters_of_their_own(store_of: GetStore) -> None:
    plugin = window_plugin(store_of("4b"), 1024, 1 / 16)
    attached = [plugin.attach_to_context(None) for _ in range(3)]
    addresses = {each._counters.address for each in attached if each._counters is not None}
    assert len(addresses) == 3
