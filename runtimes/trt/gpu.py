"""What a session does on the GPU beside TensorRT's calls: memory, streams, copies and CUDA graphs, through cuda-core.

Addresses are ints. Copies and launches go onto a stream and return at once; :meth:`Gpu.finish` waits.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.gpu.device import DeviceMemory, GpuError

ALIGNMENT_BYTES = 256
"""What TensorRT wants an address to be a multiple of; the driver's allocations are."""
_PINNED_FLAGS = 0


class Gpu:
    """The GPU that kernels were loaded onto, seen from any thread.

    ``stream`` carries all that is computed, and what is copied for it; ``uploads`` carries weights.
    """

    def __init__(self) -> None:
        """To be made where :class:`runtimes.gpu.device.GpuDevice` was: that has checked packages, driver and GPU."""
        from cuda import core
        from cuda.bindings import driver

        self._driver = driver
        self._device = core.Device()
        self._device.set_current()
        self._current = threading.local()
        self._current.is_set = True
        self.name: str = self._device.name
        # TensorRT warns of the default stream, which waits for all others; graphs cannot be captured from it.
        self.stream = self._device.create_stream()
        self.uploads = self._device.create_stream()

    def make_current(self) -> None:
        """Lets the calling thread use this GPU; cheap where it did before."""
        if not getattr(self._current, "is_set", False):
            self._device.set_current()
            self._current.is_set = True

    def allocate(self, size: int, purpose: str) -> DeviceMemory:
        """Memory of any content. ``purpose`` says what for, where there is too little.

        Raises:
            GpuError: there is not so much left.
        """
        status, address = self._driver.cuMemAlloc(max(size, ALIGNMENT_BYTES))
        if int(status) != 0:
            free, total = self._call("cuMemGetInfo")
            raise GpuError(
                f"{self.name} has no {size / 1e9:.2f} GB left for {purpose}: {free / 1e9:.2f} of {total / 1e9:.2f} GB are free",
                hint="build with fewer bits a weight (--dtype int4), a smaller --context or --batch; or free the GPU",
            )
        where = int(address)
        return DeviceMemory(where, size, lambda: self._driver.cuMemFree(where))

    def pinned(self, size: int) -> PinnedMemory:
        """Host memory that the GPU copies from and to by itself.

        Raises:
            GpuError: there is not so much left.
        """
        address = int(self._call("cuMemHostAlloc", size, _PINNED_FLAGS))
        return PinnedMemory(address, size, lambda: self._driver.cuMemFreeHost(address))

    def fill(self, address: int, byte: int, size: int) -> None:
        """Sets every byte, on ``stream``."""
        self._call("cuMemsetD8Async", address, byte, size, self.stream.handle)

    def upload(self, address: int, source: int, size: int, stream: Any | None = None) -> None:
        """Copies from pinned memory at ``source`` to the GPU."""
        self._call("cuMemcpyHtoDAsync", address, source, size, (stream or self.stream).handle)

    def download(self, target: int, address: int, size: int) -> None:
        """Copies from the GPU to pinned memory at ``target``."""
        self._call("cuMemcpyDtoHAsync", target, address, size, self.stream.handle)

    def finish(self) -> None:
        """Waits until all on ``stream`` is done.

        Raises:
            GpuError: a kernel failed; the GPU runs nothing more for this process.
        """
        try:
            self.stream.sync()
        except Exception as error:
            raise GpuError(
                f"{self.name} stopped while it computed: {error}", hint="start again; this process has lost the GPU"
            ) from error

    def capture(self, calls: Callable[[], None]) -> Any:
        """A CUDA graph of what ``calls`` puts onto ``stream``; nothing of it is run.

        Raises:
            GpuError: it cannot be captured.
        """
        builder = self.stream.create_graph_builder()
        try:
            # Other threads may allocate meanwhile: only what this one does is held to the rules of capturing.
            builder.begin_building(mode="thread_local")
            try:
                calls()
            finally:
                builder.end_building()
            return builder.complete()
        except GpuError:
            raise
        except Exception as error:
            raise GpuError(f"{self.name} does not capture a step as a CUDA graph: {error}") from error
        finally:
            builder.close()

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, name)(*arguments)
        if int(status) != 0:
            _, text = self._driver.cuGetErrorString(status)
            raise GpuError(f"{name} failed on {self.name}: {text.decode() if text else status}")
        return values[0] if len(values) == 1 else tuple(values)


class PinnedMemory:
    """Pinned host memory: ``address``, and ``bytes`` as numpy sees it; given back with the last view of it."""

    def __init__(self, address: int, size: int, free: Callable[[], Any]) -> None:
        self.address = address
        block = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(block, free)  # arrays keep the block alive, not this object
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(block)

    def array(self, begin: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A view of a part, from byte ``begin`` on."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        view: NDArray[Any] = self.bytes[begin : begin + size].view(dtype).reshape(shape)
        return view


def aligned(size: int) -> int:
    """The next multiple of what an address must be a multiple of."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
