"""A folder of ``kernels.json`` and cubins: what a build looks sizes up in, and what a GPU loads kernels from.

store = KernelStore.open(folder)                                   # reads kernels.json; makes no CUDA call
call = store.bind("window_decode", {"B": 1, "scale": 0.0625})      # loads cubins where that is still to be done
call.launch(stream, {"q": address, …}, workspace, counters)        # what a CUDA graph can capture
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import BundleError, HostError
from runtimes.gpu.device import DeviceMemory, GpuDevice
from runtimes.gpu.expression import Values, expression
from runtimes.gpu.kernel_file import (
    KERNELS_NAME,
    KernelFacts,
    KernelFile,
    KernelLaunch,
    KernelVariant,
    cubin_name,
    hash_of,
)

_C_TYPES: Mapping[str, Callable[[Any], Any]] = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip
_REBUILD = "copy or build the bundle again"


class KernelStore:
    """The kernels of one folder.

    Args:
        folder: where ``kernels.json`` is.
        file: what it says.
        hash: sha256 of its bytes.
        build_command: what a user typed to make it, as far as that is known; hints are made of it.
    """

    def __init__(self, folder: Path, file: KernelFile, hash: str, *, build_command: str = "gemma3c build") -> None:
        self.folder = folder
        self.file = file
        self.hash = hash
        self.build_command = build_command
        self._device: GpuDevice | None = None
        self._loaded: dict[tuple[str, str], Any] = {}

    @classmethod
    def open(cls, folder: Path, *, name: str = KERNELS_NAME, build_command: str = "gemma3c build") -> KernelStore:
        """Reads ``kernels.json``; the cubins are read when they are loaded.

        Raises:
            BundleError: there is no such file, or it is not what it should be.
        """
        path = folder / name
        try:
            text = path.read_bytes()
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}", hint=_REBUILD) from error
        return cls(folder, KernelFile.loads(text, where=str(path)), hash_of(text), build_command=build_command)

    def check_hash(self, wanted: str, *, who: str) -> None:
        """Raises BundleError unless ``wanted``, which ``who`` was built with, is this file's hash."""
        if wanted != self.hash:
            raise BundleError(
                f"{who} was built with the kernels {wanted[:12] or '(none)'}…, but {self.folder / KERNELS_NAME} has "
                f"the hash {self.hash[:12]}…",
                hint="the files are of two builds: build the bundle again",
            )

    def workspace_bytes(self, name: str, values: Values | None = None) -> int:
        """The most that any variant of a kernel wants, on any architecture, up to sizes of ``values``.

        Args:
            values: None takes the largest of each dimension.

        Raises:
            BundleError: there is no such kernel, or it is not made for these sizes.
        """
        facts = self.file.kernel(name)
        _check_range(name, facts, values or facts.largest)
        at = {**facts.largest, **(values or {})}
        return max((variant.workspace(at)[2] for variant in facts.variants), default=0)

    def counter_bytes(self, names: Iterable[str]) -> int:
        """Enough for the counters of any one of these kernels, at the largest sizes."""
        every = ((facts, v) for facts in map(self.file.kernel, names) for v in facts.variants)
        return max((variant.counters(facts.largest)[1] for facts, variant in every), default=0)

    @property
    def device(self) -> GpuDevice:
        """The GPU, which is looked for the first time that it is asked for.

        Raises:
            HostError: there is none, its driver is too old, or no kernel here is compiled for it.
        """
        if self._device is None:
            device = GpuDevice()
            if device.architecture not in self.file.architectures:
                have = ", ".join(f"sm_{a}" for a in self.file.architectures) or "none"
                raise HostError(
                    f"{self.folder / KERNELS_NAME} has kernels for {have}, but {device.name} is sm_{device.architecture}",
                    hint=f"build for this GPU: {self.build_command} --arch sm_{device.architecture}",
                )
            self._device = device
        return self._device

    def load(self) -> None:
        """Loads every cubin of this GPU now.

        Raises:
            HostError: as ``device``, or the driver refuses a cubin.
            BundleError: a cubin is missing, or is not the one that was built.
        """
        for facts in self.file.kernels.values():
            for variant in facts.variants:
                if variant.architecture == self.device.architecture:
                    for launch in variant.launches:
                        self._kernel(launch)

    def zeros(self, size: int) -> DeviceMemory:
        """Memory for counters; not to be asked for while a graph is captured."""
        return self.device.zeros(size)

    def bind(self, name: str, values: Values) -> BoundKernel:
        """A kernel for calls of these sizes and parameters.

        Raises:
            BundleError: there is no such kernel, or it is not made for these sizes.
            HostError: as ``load``.
        """
        facts = self.file.kernel(name)
        _check_range(name, facts, values)
        variant = facts.variant(self.device.architecture, values)
        if variant is None:
            raise BundleError(f"{name} has no variant for sm_{self.device.architecture} at {dict(values)}")
        launches = tuple(_bound(self.device, self._kernel(launch), launch, values) for launch in variant.launches)
        workspaces, scratch, size = variant.workspace(values)
        counters, counter_bytes = variant.counters(values)
        return BoundKernel(
            name=name,
            variant=variant,
            device=self.device,
            shapes={tensor.name: tensor.sizes(values) for tensor in variant.tensors},
            launches=launches,
            workspaces=tuple(workspaces.items()),
            scratch=scratch,
            workspace_bytes=size,
            counters=tuple(counters.items()),
            counter_bytes=counter_bytes,
        )

    def _kernel(self, launch: KernelLaunch) -> Any:
        key = (launch.cubin, launch.symbol)
        if key not in self._loaded:
            self._loaded[key] = self.device.load(self._cubin(launch.cubin), launch.symbol, launch.shared_bytes)
        return self._loaded[key]

    def _cubin(self, digest: str) -> bytes:
        path = self.folder / cubin_name(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}", hint=_REBUILD) from error
        if hash_of(data) != digest:
            raise BundleError(f"{path} was changed: its hash is {hash_of(data)[:12]}…", hint=_REBUILD)
        return data


@dataclass(frozen=True, kw_only=True)
class _BoundLaunch:
    """``arguments`` with gaps (None) where ``addresses`` go: place, tensor, offset. The last but one is the scratch."""

    config: Any
    kernel: Any
    arguments: tuple[Any, ...]
    addresses: tuple[tuple[int, str, int], ...]
    has_scratch: bool


@dataclass(frozen=True, kw_only=True)
class BoundKernel:
    """A kernel, loaded and fixed to sizes: what is left open are addresses.

    Args:
        shapes: of every tensor that it reads or writes, workspaces included.
        workspace_bytes: memory that :meth:`launch` is to be given, aligned to 256 bytes, of any content.
        counter_bytes: memory that it is to be given which holds zeros; it does again when all launches have ended.
    """

    name: str
    variant: KernelVariant
    device: GpuDevice
    shapes: Mapping[str, tuple[int, ...]]
    launches: tuple[_BoundLaunch, ...]
    workspaces: tuple[tuple[str, int], ...]
    scratch: tuple[int, ...]
    workspace_bytes: int
    counters: tuple[tuple[str, int], ...]
    counter_bytes: int

    def launch(self, stream: int, tensors: Mapping[str, int], workspace: int = 0, counters: int = 0) -> None:
        """Launches on a raw ``CUstream``; a CUDA graph can capture it.

        Args:
            tensors: the address of every input and output, on the device, each a multiple of 16.

        Raises:
            GpuError: the driver refused.
        """
        addresses = dict(tensors)
        addresses.update((name, workspace + begin) for name, begin in self.workspaces)
        addresses.update((name, counters + begin) for name, begin in self.counters)
        for launch, scratch in zip(self.launches, self.scratch, strict=True):
            arguments = list(launch.arguments)
            for place, name, offset in launch.addresses:
                arguments[place] = addresses[name] + offset
            if launch.has_scratch:
                arguments[-2] = workspace + scratch
            self.device.launch(stream, launch.config, launch.kernel, arguments)


def _check_range(name: str, facts: KernelFacts, values: Values) -> None:
    for dimension, (low, high) in facts.dimensions.items():
        if not low <= values.get(dimension, low - 1) <= high:
            raise BundleError(
                f"{name} is made for `{low} <= {dimension} <= {high}`, but got {values.get(dimension)}",
                hint="what a bundle is built for is its largest batch and chunk",
            )


def _bound(device: GpuDevice, kernel: Any, launch: KernelLaunch, values: Values) -> _BoundLaunch:
    arguments: list[Any] = []
    addresses = []
    for place, argument in enumerate(launch.arguments):
        if argument.tensor is not None:
            addresses.append((place, argument.tensor, argument.offset))
            arguments.append(None)
            continue
        assert argument.value is not None, "an argument without a tensor has a value"
        if argument.type not in _C_TYPES:
            raise BundleError(f"the argument {argument.name} of {launch.symbol} has the unknown type {argument.type!r}")
        arguments.append(_C_TYPES[argument.type](expression(argument.value)(values)))
    return _BoundLaunch(
        config=device.config(
            launch.programs(values), 32 * launch.num_warps, launch.shared_bytes, dependent=launch.dependent
        ),
        kernel=kernel,
        arguments=(*arguments, 0, 0),
        addresses=tuple(addresses),
        has_scratch=launch.scratch_bytes > 0,
    )
