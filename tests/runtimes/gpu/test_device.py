"""What a host gets to hear that lacks cuda-core, a driver, a GPU or a new enough driver; what the driver is told."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from runtimes.errors import HostError
from runtimes.gpu import device as module
from runtimes.gpu.device import GpuDevice, GpuError


class FakeDriver:
    """cuda.bindings.driver: notes calls, answers ``replies`` or success."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.replies: dict[str, tuple[Any, ...]] = {
            "cuDriverGetVersion": (0, 13010),
            "cuGetErrorString": (0, b"out of memory"),
            "cuMemAlloc": (0, 4096),
        }

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return self.replies.get(name, (0,))

        return call


class FakeCore:
    """cuda.core."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.device = SimpleNamespace(
            device_id=0, name="NVIDIA H100", compute_capability=(9, 0), set_current=lambda: None
        )
        kernel = SimpleNamespace(handle="kernel")
        self.ObjectCode = SimpleNamespace(from_cubin=lambda cubin: SimpleNamespace(get_kernel=lambda symbol: kernel))
        self.Stream = SimpleNamespace(from_handle=lambda handle: f"stream {handle}")

    def Device(self) -> Any:
        return self.device

    def LaunchConfig(self, **fields: Any) -> dict[str, Any]:
        return fields

    def launch(self, *arguments: Any) -> None:
        self.launched.append(arguments)


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def driver(core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    monkeypatch.setattr(module, "_packages", lambda: (core, made))
    bindings = ModuleType("cuda.bindings")
    bindings.__version__ = "13.5.0"  # type: ignore[attr-defined]
    package = ModuleType("cuda")
    package.bindings = bindings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return made


def test_what_is_found(driver: FakeDriver) -> None:
    device = GpuDevice()
    assert (device.name, device.architecture, device.driver_version) == ("NVIDIA H100", 90, "13.1")


def test_shared_memory_beyond_48_kib_is_asked_for(driver: FakeDriver) -> None:
    device = GpuDevice()
    device.load(b"", "f", 49_152)
    assert "cuKernelSetAttribute" not in [call[0] for call in driver.calls]
    device.load(b"", "f", 49_153)
    assert ("cuKernelSetAttribute", "shared", 49_153, "kernel", 0) in driver.calls
    assert driver.calls[-1] == ("cuKernelGetFunction", "kernel")  # loaded now, not at the first launch


def test_a_launch(driver: FakeDriver, core: FakeCore) -> None:
    device = GpuDevice()
    plain, dependent = (device.config((1, 2, 3), 128, 64, dependent=flag) for flag in (False, True))
    assert plain == {"grid": (1, 2, 3), "block": 128, "shmem_size": 64}
    assert dependent == plain | {"programmatic_stream_serialization": True}
    device.launch(7, plain, "kernel", [1, 2])
    assert core.launched == [("stream 7", plain, "kernel", 1, 2)]


def test_memory_is_zeroed_and_given_back(driver: FakeDriver) -> None:
    memory = GpuDevice().zeros(512)
    assert memory.address == 4096
    assert driver.calls[-2:] == [("cuMemsetD8", 4096, 0, 512), ("cuCtxSynchronize",)]
    memory.close()
    memory.close()
    assert driver.calls.count(("cuMemFree", 4096)) == 1
    driver.replies["cuMemAlloc"] = (2,)
    with pytest.raises(GpuError, match="cuMemAlloc failed on this GPU: out of memory"):
        GpuDevice().zeros(512)


def test_a_driver_that_is_too_old(driver: FakeDriver) -> None:
    driver.replies["cuDriverGetVersion"] = (0, 12080)
    with pytest.raises(HostError, match=r"knows CUDA up to 12\.8, but cuda-bindings 13\.5\.0 needs 13\.0") as caught:
        GpuDevice()
    assert "update the NVIDIA driver" in str(caught.value.hint)


def test_a_cubin_that_the_driver_refuses(driver: FakeDriver) -> None:
    driver.replies["cuKernelGetFunction"] = (209,)
    driver.replies["cuGetErrorString"] = (0, b"no kernel image is available")
    with pytest.raises(
        HostError, match=r"the driver \(CUDA 13\.1\) does not load f for NVIDIA H100 \(sm_90\): .*image"
    ):
        GpuDevice().load(b"", "f", 0)


def test_no_gpu_behind_a_driver(driver: FakeDriver, core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> Any:
        raise RuntimeError("CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr(core, "Device", nothing)
    with pytest.raises(HostError, match="no CUDA GPU can be used on this host: CUDA_ERROR_NO_DEVICE"):
        GpuDevice()


def test_no_driver(driver: FakeDriver) -> None:
    driver.replies["cuInit"] = (100,)
    driver.replies["cuGetErrorString"] = (0, b"no CUDA-capable device is detected")
    with pytest.raises(HostError, match=r"no NVIDIA driver answers on this host: .*no CUDA-capable device"):
        GpuDevice()


def test_no_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(HostError, match="launched through cuda-core, which is missing") as caught:
        GpuDevice()
    assert "gemma3-compile[cuda]" in str(caught.value.hint)
