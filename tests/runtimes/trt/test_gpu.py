"""Memory, copies and graphs: on the stand-in, which shows that it behaves as a GPU does, and on a real one."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtimes.gpu.device import GpuDevice, GpuError
from runtimes.progress import SILENT
from runtimes.trt import weights as module
from runtimes.trt.bfloat16 import bits_of, floats_of
from runtimes.trt.gpu import Gpu, aligned
from runtimes.trt.weights import WeightInput, WeightsFile, check_weights, upload_weights
from tests.runtimes.trt.cuda_standin import CudaStandIn


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    if request.param == "stand-in":
        CudaStandIn().install(monkeypatch)
    GpuDevice()
    yield Gpu()


def test_there_and_back(gpu: Gpu) -> None:
    given, result = gpu.pinned(1000), gpu.pinned(1000)
    memory = gpu.allocate(1000, "a test")
    assert memory.address % 256 == 0
    given.bytes[:] = np.arange(1000) % 251
    gpu.upload(memory.address, given.address, 1000)
    gpu.fill(memory.address + 10, 0xFF, 5)
    gpu.download(result.address, memory.address, 1000)
    gpu.finish()
    expected = given.bytes.copy()
    expected[10:15] = 255
    np.testing.assert_array_equal(result.bytes, expected)
    np.testing.assert_array_equal(result.array(8, (3, 2), np.int32).ravel(), expected[8:32].view(np.int32))


def test_a_graph_of_copies(gpu: Gpu) -> None:
    given, result = gpu.pinned(256), gpu.pinned(256)
    memory = gpu.allocate(256, "a test")
    result.bytes[:] = 0

    def calls() -> None:
        gpu.upload(memory.address, given.address, 256)
        gpu.download(result.address, memory.address, 256)

    given.bytes[:] = 1
    graph = gpu.capture(calls)
    gpu.finish()
    assert not result.bytes.any()  # nothing was run
    for number in (2, 3):
        given.bytes[:] = number
        graph.launch(gpu.stream)
        gpu.finish()
        assert (result.bytes == number).all()
    graph.close()


def test_a_capture_that_fails_leaves_the_stream_usable(gpu: Gpu) -> None:
    def calls() -> None:
        raise GpuError("no")

    with pytest.raises(GpuError, match="no"):
        gpu.capture(calls)
    test_there_and_back(gpu)


def test_pinned_memory_lives_as_long_as_its_views(gpu: Gpu) -> None:
    view = gpu.pinned(64).array(0, (16,), np.float32)
    view[:] = 3
    assert view.sum() == 48


def weights_file(folder: Path, sizes: dict[str, int]) -> WeightsFile:
    rng, header, data = np.random.default_rng(0), {}, b""
    for name, size in sizes.items():
        raw = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
        data += raw
    text = json.dumps({"__metadata__": {"made": "by hand"}, **header}).encode()
    path = folder / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return WeightsFile(path)


def test_weights_are_uploaded(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAGING_BYTES", 1 << 16)
    sizes = {"a": 1, "b": 7 * (1 << 16), "c": (1 << 16) + 3, "unused": 9}
    file = weights_file(tmp_path, sizes)
    inputs = [WeightInput(name=name, dtype="UINT8", shape=(sizes[name[0]],)) for name in ("c", "a@x", "a@y", "b")]
    check_weights(inputs, file, plan="a.plan")
    uploaded = upload_weights(inputs, file, gpu, SILENT)
    assert uploaded.addresses["a@x"] == uploaded.addresses["a@y"]
    assert uploaded.memory.bytes == sum(aligned(sizes[name]) for name in "abc")
    for each in inputs:
        entry = file.entries[each.name[0]]
        result = gpu.pinned(entry.bytes)
        gpu.download(result.address, uploaded.addresses[each.name], entry.bytes)
        gpu.finish()
        assert uploaded.addresses[each.name] % 256 == 0
        assert result.bytes.tobytes() == bytes(file.view(entry.begin, entry.end)), each.name


def test_bfloat16_as_torch_has_it() -> None:
    import torch

    bits = np.arange(1 << 16, dtype=np.uint16)
    floats = floats_of(bits)
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(floats, theirs)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF], np.uint32).view(np.float32)])
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bits_of(values), expected)
    assert np.isnan(floats_of(bits_of(np.array([np.nan], np.float32)))).all()
