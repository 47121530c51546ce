"""The GPU of this thread, through cuda-core: cubins become kernels, kernels are launched on anybody's stream."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from runtimes.errors import Gemma3CompileError, HostError

_PLAIN_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory of a block that a kernel may take without being told beforehand."""
_INSTALL = "pip install 'gemma3-compile[cuda]'; the extras `trt` and `trt-rtx` bring cuda-core too"
_UPDATE = "update the NVIDIA driver: https://www.nvidia.com/drivers"


class GpuError(Gemma3CompileError):
    """The driver refused a call, or a kernel failed."""


class GpuDevice:
    """The device of the current CUDA context, or the first one, which then is made current.

    Args (found, not given):
        name: as the driver has it.
        architecture: 90 for compute capability 9.0.
        driver_version: the newest CUDA that the driver knows: ``13.0``.
    """

    def __init__(self) -> None:
        """Raises HostError where cuda-core, a driver or a GPU is missing, or the driver is too old."""
        self._core, self._driver = _packages()
        self.driver_version = self._checked_driver()
        try:
            self._device = self._core.Device()
            self._device.set_current()
        except Exception as error:
            raise HostError(
                f"no CUDA GPU can be used on this host: {error}", hint="`nvidia-smi` lists those that the driver sees"
            ) from error
        major, minor = self._device.compute_capability
        self.architecture = 10 * major + minor
        self.name: str = self._device.name
        self._streams: dict[int, Any] = {}

    def load(self, cubin: bytes, symbol: str, shared_bytes: int) -> Any:
        """The kernel ``symbol`` of a cubin, loaded into the current context, ready to take ``shared_bytes``.

        Nothing is left to be done at its first launch, which may be while a graph is captured.

        Raises:
            HostError: the driver does not take it.
        """
        try:
            kernel = self._core.ObjectCode.from_cubin(cubin).get_kernel(symbol)
            if shared_bytes > _PLAIN_SHARED_BYTES:
                attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                device = self._device.device_id
                self._call("cuKernelSetAttribute", attribute, shared_bytes, kernel.handle, device)
            self._call("cuKernelGetFunction", kernel.handle)
        except Exception as error:
            raise HostError(
                f"the driver (CUDA {self.driver_version}) does not load {symbol} for {self.name} "
                f"(sm_{self.architecture}): {error}",
                hint=_UPDATE,
            ) from error
        return kernel

    def config(self, grid: tuple[int, int, int], threads: int, shared_bytes: int, *, dependent: bool) -> Any:
        """How a kernel is launched."""
        more = {"programmatic_stream_serialization": True} if dependent else {}
        return self._core.LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes, **more)

    def launch(self, stream: int, config: Any, kernel: Any, arguments: Sequence[Any]) -> None:
        """Launches on a raw ``CUstream``. ``arguments``: an int is an address; numbers are of ctypes.

        Raises:
            GpuError: the driver refused; the GPU may be in a state in which nothing more runs.
        """
        held = self._streams.get(stream)
        if held is None:
            held = self._streams[stream] = self._core.Stream.from_handle(stream)
        try:
            self._core.launch(held, config, kernel, *arguments)
        except Exception as error:
            raise GpuError(f"a kernel was not launched on {self.name}: {error}") from error

    def zeros(self, size: int) -> DeviceMemory:
        """Memory that holds zeros. Not to be called while a graph is captured.

        Raises:
            GpuError: there is not so much left.
        """
        address = int(self._call("cuMemAlloc", size))
        memory = DeviceMemory(address, size, lambda: self._driver.cuMemFree(address))
        self._call("cuMemsetD8", address, 0, size)
        self._call("cuCtxSynchronize")  # the default stream wrote them, and other streams do not wait for it
        return memory

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        if int(status) != 0:
            _, text = self._driver.cuGetErrorString(status)
            raise GpuError(f"{name} failed on this GPU: {text.decode() if text else status}")
        return values[0] if values else None

    def _checked_driver(self) -> str:
        from cuda import bindings

        try:
            found = int(self._call("cuDriverGetVersion"))
            self._call("cuInit", 0)
        except Exception as error:
            raise HostError(
                f"no NVIDIA driver answers on this host: {error}",
                hint="run where there is an NVIDIA GPU; the target `ort` runs on a CPU",
            ) from error
        version = f"{found // 1000}.{found % 1000 // 10}"
        wanted = bindings.__version__.partition(".")[0]
        if found // 1000 < int(wanted):
            raise HostError(
                f"the NVIDIA driver knows CUDA up to {version}, but cuda-bindings {bindings.__version__} needs {wanted}.0",
                hint=_UPDATE,
            )
        return version


class DeviceMemory:
    """Memory on the GPU: ``address``, and ``bytes`` of it; given back with the last reference to this."""

    def __init__(self, address: int, size: int, free: Any) -> None:
        self.address = address
        self.bytes = size
        self._finalizer = weakref.finalize(self, free)

    def close(self) -> None:
        """Gives it back now."""
        self._finalizer()


def _packages() -> tuple[Any, Any]:
    try:
        from cuda import core
        from cuda.bindings import driver
    except ImportError as error:
        raise HostError(f"kernels are launched through cuda-core, which is missing: {error}", hint=_INSTALL) from error
    if not hasattr(core, "ObjectCode"):
        raise HostError(f"cuda-core {core.__version__} is too old", hint=_INSTALL)
    return core, driver
