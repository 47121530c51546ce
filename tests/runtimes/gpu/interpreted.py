"""A GPU that is none: launches run in Triton's interpreter, on the memory of this process.

All that a host without torch and triton does is thereby done as it is on a GPU: looking up, hashing, evaluating and
putting arguments in order. Only the cubin is not run, but the function that it was compiled from.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from runtimes.gpu import kernel_store
from runtimes.gpu.device import DeviceMemory
from runtimes.gpu.kernel_file import KernelLaunch, hash_of
from runtimes.gpu.kernel_store import KernelStore
from tests.autotune import conftest as repairs_of_the_interpreter  # noqa: F401

_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "i32": torch.int32, "i64": torch.int64, "i8": torch.int8}
_MODULES = ("cache_write", "window_prefill", "decode_attention", "pool_norm")


@dataclass(frozen=True)
class Config:
    """What a launch was configured with."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    dependent: bool


class InterpretedDevice:
    """In the place of :class:`runtimes.gpu.device.GpuDevice`.

    ``memory``: every tensor that an address may point into. ``launched`` notes the launches.
    """

    name = "Triton's interpreter"

    def __init__(self, architecture: int, launches: Iterable[KernelLaunch]) -> None:
        self.architecture = architecture
        self.memory: list[Tensor] = []
        self.launched: list[tuple[str, Config]] = []
        self._launches = {(launch.cubin, launch.symbol): launch for launch in launches}

    def load(self, cubin: bytes, symbol: str, shared_bytes: int) -> KernelLaunch:
        launch = self._launches[hash_of(cubin), symbol]
        assert symbol.encode() in cubin
        assert launch.shared_bytes == shared_bytes
        return launch

    def config(self, grid: tuple[int, int, int], threads: int, shared_bytes: int, *, dependent: bool) -> Config:
        return Config(grid, threads, shared_bytes, dependent)

    def launch(self, stream: int, config: Config, kernel: KernelLaunch, arguments: Sequence[Any]) -> None:
        assert len(arguments) == len(kernel.arguments) + 2
        named: dict[str, Any] = {}
        for facts, given in zip(kernel.arguments, arguments, strict=False):
            if facts.type.startswith("*"):
                assert given % 16 == 0
                named[facts.name] = self._tensor(given, _TYPES[facts.type[1:]])
            else:
                assert isinstance(given, ctypes._SimpleCData)
                named[facts.name] = given.value
        constants = dict(kernel.constants)
        if config.dependent:
            constants["DEPENDENT"] = False
        _function(kernel.symbol)[config.grid](**named, **constants)
        self.launched.append((kernel.symbol, config))

    def zeros(self, size: int) -> DeviceMemory:
        memory = torch.zeros(size, dtype=torch.uint8)
        self.memory.append(memory)
        return DeviceMemory(memory.data_ptr(), size, lambda: None)

    def _tensor(self, address: int, dtype: torch.dtype) -> Tensor:
        for tensor in self.memory:
            begin = address - tensor.data_ptr()
            if 0 <= begin < tensor.numel() * tensor.itemsize:
                return tensor.view(-1).view(torch.uint8)[begin:].view(dtype)
        raise AssertionError(f"{address:#x} points into no tensor of this test")


def interpreted(store: KernelStore, architecture: int, monkeypatch: pytest.MonkeyPatch) -> InterpretedDevice:
    """Gives the store this device."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here, not interpreted: a GPU runs the same in test_plugin_enqueue.py")
    launches = [
        launch for facts in store.file.kernels.values() for variant in facts.variants for launch in variant.launches
    ]
    device = InterpretedDevice(architecture, launches)
    monkeypatch.setattr(kernel_store, "GpuDevice", lambda: device)
    return device


def _function(symbol: str) -> Any:
    for name in _MODULES:
        found = getattr(import_module(f"autotune.kernels.{name}"), symbol, None)
        if found is not None and found.fn.__module__.endswith(name):
            return found
    raise AssertionError(f"none of {', '.join(_MODULES)} has {symbol}")
