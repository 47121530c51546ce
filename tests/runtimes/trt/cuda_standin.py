"""A GPU that is the host's memory: what of cuda-core and of its driver bindings the session calls, with CUDA's rules.

Work on a stream is done when somebody waits for it, no earlier: who reads a result too soon, or writes over what is still
to be copied, sees it. New memory is full of ones (a NaN, or -1); what was given back may not be touched.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Work = Callable[[], None]
_ALIGNMENT = 256


class Memory:
    """Blocks by their first address."""

    def __init__(self) -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}

    def new(self, size: int) -> int:
        raw = np.full(size + _ALIGNMENT, 0xFF, np.uint8)
        offset = -raw.ctypes.data % _ALIGNMENT
        block = raw[offset : offset + size]
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def at(self, address: int, size: int) -> NDArray[np.uint8]:
        """The bytes there, which must lie in one block that was not given back."""
        for begin, block in self.blocks.items():
            if begin <= address and address + size <= begin + len(block):
                return block[address - begin : address - begin + size]
        raise AssertionError(f"{size} bytes at {address:#x} were not allocated, or were given back")

    @property
    def bytes(self) -> int:
        return sum(len(block) for block in self.blocks.values())


class Stream:
    """Work in order, or, while it is captured, what a graph is made of."""

    def __init__(self, cuda: CudaStandIn) -> None:
        self.cuda = cuda
        self.handle = next(cuda.numbers)
        cuda.streams[self.handle] = self
        self.work: list[Work] = []
        self.done = 0
        self.captured: list[Work] | None = None

    def put(self, work: Work) -> None:
        (self.work if self.captured is None else self.captured).append(work)

    def run_up_to(self, end: int) -> None:
        while self.done < end:
            self.done += 1
            self.work[self.done - 1]()

    def sync(self) -> None:
        assert self.captured is None, "a stream that is captured cannot be waited for"
        if self.cuda.broken:
            raise RuntimeError(self.cuda.broken)
        self.run_up_to(len(self.work))

    def record(self) -> Any:
        end = len(self.work)
        return SimpleNamespace(sync=lambda: self.run_up_to(end))

    def wait(self, other: Stream) -> None:
        end = len(other.work)
        self.put(lambda: other.run_up_to(end))

    def create_graph_builder(self) -> Builder:
        return Builder(self)


class Builder:
    """Of a graph."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.work: list[Work] = []

    def begin_building(self, mode: str) -> None:
        assert mode == "thread_local"
        self.stream.captured = self.work
        self.stream.cuda.capturing = True

    def end_building(self) -> None:
        self.stream.captured = None
        self.stream.cuda.capturing = False

    def complete(self) -> Graph:
        return Graph(self.stream.cuda, list(self.work))

    def close(self) -> None:
        assert self.stream.captured is None


class Graph:
    def __init__(self, cuda: CudaStandIn, work: list[Work]) -> None:
        self.cuda, self.work, self.open = cuda, work, True
        cuda.graphs.append(self)
        self.launches = 0

    def launch(self, stream: Stream) -> None:
        assert self.open
        self.launches += 1
        for work in self.work:
            stream.put(work)

    def close(self) -> None:
        self.open = False


class CudaStandIn:
    """Both modules. ``broken``: what a wait fails with; ``limit_bytes``: how much memory the GPU has."""

    def __init__(self, *, name: str = "NVIDIA A100", capability: tuple[int, int] = (8, 0)) -> None:
        self.numbers = count(1)
        self.device_memory, self.pinned_memory = Memory(), Memory()
        self.streams: dict[int, Stream] = {}
        self.graphs: list[Graph] = []
        self.capturing = False
        self.broken = ""
        self.limit_bytes = 1 << 40
        self.can_capture = True
        device = SimpleNamespace(
            name=name, compute_capability=capability, device_id=0, set_current=lambda: None,
            create_stream=lambda: Stream(self),
        )  # fmt: skip
        kernel = SimpleNamespace(handle="kernel")
        self.core = SimpleNamespace(
            Device=lambda: device,
            ObjectCode=SimpleNamespace(from_cubin=lambda cubin: SimpleNamespace(get_kernel=lambda symbol: kernel)),
            Stream=SimpleNamespace(from_handle=lambda handle: self.streams[handle]),
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts the modules in the place of the real ones."""
        import sys

        bindings = ModuleType("cuda.bindings")
        vars(bindings).update(__version__="13.5.0", driver=Driver(self))
        package = ModuleType("cuda")
        vars(package).update(core=self.core, bindings=bindings)
        for module in (package, bindings):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(sys.modules, "cuda.core", self.core)


class Driver:
    """cuda.bindings.driver: every call gives a status and then its values."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self, cuda: CudaStandIn) -> None:
        self.cuda = cuda

    def cuDriverGetVersion(self) -> Any:
        return 0, 13010

    def cuInit(self, flags: int) -> Any:
        return (0,)

    def cuKernelGetFunction(self, kernel: Any) -> Any:
        return 0, "function"

    def cuKernelSetAttribute(self, *arguments: Any) -> Any:
        return (0,)

    def cuCtxSynchronize(self) -> Any:
        return (0,)

    def cuGetErrorString(self, status: int) -> Any:
        return 0, b"out of memory"

    def cuMemGetInfo(self) -> Any:
        return 0, self.cuda.limit_bytes - self.cuda.device_memory.bytes, self.cuda.limit_bytes

    def cuMemAlloc(self, size: int) -> Any:
        assert not self.cuda.capturing, "nothing is allocated while a graph is captured"
        if self.cuda.device_memory.bytes + size > self.cuda.limit_bytes:
            return 2, None
        return 0, self.cuda.device_memory.new(size)

    def cuMemFree(self, address: int) -> Any:
        del self.cuda.device_memory.blocks[address]
        return (0,)

    def cuMemHostAlloc(self, size: int, flags: int) -> Any:
        return 0, self.cuda.pinned_memory.new(size)

    def cuMemFreeHost(self, address: int) -> Any:
        del self.cuda.pinned_memory.blocks[address]
        return (0,)

    def cuMemsetD8(self, address: int, byte: int, size: int) -> Any:
        self.cuda.device_memory.at(address, size)[:] = byte
        return (0,)

    def cuMemsetD8Async(self, address: int, byte: int, size: int, stream: int) -> Any:
        self.cuda.device_memory.at(address, size)
        self.cuda.streams[stream].put(lambda: self.cuda.device_memory.at(address, size).fill(byte))
        return (0,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> Any:
        return self._copy(self.cuda.device_memory, target, self.cuda.pinned_memory, source, size, stream)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> Any:
        return self._copy(self.cuda.pinned_memory, target, self.cuda.device_memory, source, size, stream)

    def _copy(self, to: Memory, target: int, of: Memory, source: int, size: int, stream: int) -> Any:
        to.at(target, size), of.at(source, size)  # both must be there now, and still when it is done

        def work() -> None:
            to.at(target, size)[:] = of.at(source, size)

        self.cuda.streams[stream].put(work)
        return (0,)
