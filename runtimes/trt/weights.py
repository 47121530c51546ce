"""Weights that are inputs of a plan: from the bundle's safetensors file to the GPU.

The file is mapped, not read; its pages go through pinned buffers, so that the GPU copies one while the next is filled.

Source: the format of safetensors: eight bytes of length, a JSON header, then the data that its offsets count in.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import BundleError
from runtimes.gpu.device import DeviceMemory
from runtimes.progress import Progress
from runtimes.trt.gpu import Gpu, aligned

_MAX_HEADER_BYTES = 100 << 20
"""As the safetensors library has it."""
STAGING_BYTES = 32 << 20
_BUFFERS = 3
"""One that is filled, one that is copied, and one that may wait for either."""
_REBUILD = "copy or build the bundle again"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the file: where its bytes begin and end, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self.end - self.begin


class WeightsFile:
    """A safetensors file, mapped. ``entries`` are its tensors by name.

    Raises:
        BundleError: the file cannot be read, or is not what the format says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read {path}: {error}", hint=_REBUILD) from error
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)  # the system reads ahead
        try:
            self.entries = dict(self._entries())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{path} is not a whole safetensors file: {error}", hint=_REBUILD) from error

    def view(self, begin: int, end: int) -> memoryview:
        """Bytes of the file."""
        return memoryview(self._map)[begin:end]

    def _entries(self) -> Iterator[tuple[str, Entry]]:
        size = len(self._map)
        data_begin = 8 + int.from_bytes(self._map[:8], "little")
        if not 8 < data_begin <= min(size, 8 + _MAX_HEADER_BYTES):
            raise ValueError(f"its header would have {data_begin - 8} bytes, of {size} in all")
        for name, facts in json.loads(self._map[8:data_begin]).items():
            if name == "__metadata__":
                continue
            begin, end = (data_begin + int(offset) for offset in facts["data_offsets"])
            if not data_begin <= begin <= end <= size:
                raise ValueError(f"{name} lies at {begin} to {end}, but the file has {size} bytes")
            yield name, Entry(dtype=str(facts["dtype"]), shape=tuple(facts["shape"]), begin=begin, end=end)


def entry_name(input_name: str) -> str:
    """The entry that an input of a plan takes: its own name, up to an ``@``."""
    return input_name.partition("@")[0]


@dataclass(frozen=True, kw_only=True)
class WeightInput:
    """An input of a plan that is a weight. ``dtype`` is TensorRT's name: ``BF16``, ``INT4``."""

    name: str
    dtype: str
    shape: tuple[int, ...]


_TAKES: Mapping[str, tuple[int, frozenset[str]]] = {
    "BF16": (16, frozenset({"BF16"})),
    "HALF": (16, frozenset({"F16"})),
    "FLOAT": (32, frozenset({"F32"})),
    "INT8": (8, frozenset({"I8"})),
    "UINT8": (8, frozenset({"U8"})),
    "FP8": (8, frozenset({"F8_E4M3"})),
    "INT4": (4, frozenset({"U8", "I4"})),
    "INT32": (32, frozenset({"I32"})),
    "INT64": (64, frozenset({"I64"})),
}
"""Bits of an element, and what an entry may call it. int4 lies two in a byte."""


def check_weights(inputs: Iterable[WeightInput], file: WeightsFile, *, plan: str) -> None:
    """Compares a plan's weight inputs with the file, all of them before any is uploaded.

    Raises:
        BundleError: names the first inputs that have no entry, or one of another type or size.
    """
    problems = [problem for each in inputs if (problem := _problem(each, file.entries.get(entry_name(each.name))))]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BundleError(
            f"the weights in {file.path} are not those that {plan} takes: {'; '.join(problems[:3])}{more}",
            hint="the files are of two builds: build the bundle again",
        )


def _problem(wanted: WeightInput, entry: Entry | None) -> str | None:
    if entry is None:
        return f"there is no entry {entry_name(wanted.name)}"
    if wanted.dtype not in _TAKES:
        return f"{wanted.name} is of {wanted.dtype}, which this version does not know"
    bits, names = _TAKES[wanted.dtype]
    size = -(-math.prod(wanted.shape) * bits // 8)
    if entry.dtype not in names or entry.bytes != size:
        return (
            f"{wanted.name} is {wanted.dtype} {list(wanted.shape)} of {size} bytes, but the entry is {entry.dtype} "
            f"{list(entry.shape)} of {entry.bytes}"
        )
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class UploadedWeights:
    """Weights on the GPU, in one piece of memory: ``addresses`` by the names of a plan's inputs."""

    memory: DeviceMemory
    addresses: Mapping[str, int]


def upload_weights(inputs: Iterable[WeightInput], file: WeightsFile, gpu: Gpu, progress: Progress) -> UploadedWeights:
    """Copies what ``inputs`` take; an entry that several take is copied once.

    The copies go onto ``gpu.uploads``; ``gpu.stream`` is told to wait for them.

    Raises:
        GpuError: the GPU has no room.
    """
    inputs = tuple(inputs)
    # In the order of the file, which a disk reads best.
    names = sorted({entry_name(each.name) for each in inputs}, key=lambda name: file.entries[name].begin)
    places, total = {}, 0
    for name in names:
        places[name] = total
        total += aligned(file.entries[name].bytes)
    memory = gpu.allocate(total, "the weights")
    staging = _Staging(gpu)
    with progress.task("uploading weights", total=sum(file.entries[n].bytes for n in names), unit="bytes") as advance:
        for name in names:
            entry = file.entries[name]
            for begin in range(entry.begin, entry.end, STAGING_BYTES):
                end = min(begin + STAGING_BYTES, entry.end)
                staging.copy(file.view(begin, end), memory.address + places[name] + begin - entry.begin)
                advance(end - begin)
    staging.finish()
    return UploadedWeights(
        memory=memory, addresses={each.name: memory.address + places[entry_name(each.name)] for each in inputs}
    )


class _Staging:
    """Pinned buffers in turn, each with the event after which it may be filled again."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._buffers = [gpu.pinned(STAGING_BYTES) for _ in range(_BUFFERS)]
        self._events: list[Any] = [None] * _BUFFERS
        self._next = 0

    def copy(self, source: memoryview, address: int) -> None:
        number, size = self._next, len(source)
        if self._events[number] is not None:
            self._events[number].sync()
        buffer = self._buffers[number]
        buffer.bytes[:size] = np.frombuffer(source, np.uint8)
        self._gpu.upload(address, buffer.address, size, self._gpu.uploads)
        self._events[number] = self._gpu.uploads.record()
        self._next = (number + 1) % _BUFFERS

    def finish(self) -> None:
        """Waits for the copies: the buffers are given back after this."""
        self._gpu.stream.wait(self._gpu.uploads)
        self._gpu.uploads.sync()
