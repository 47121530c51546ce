"""The store: what it reads, checks, selects and puts into a launch. The GPU is a note-book."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runtimes.errors import BundleError, HostError
from runtimes.gpu import kernel_store
from runtimes.gpu.device import DeviceMemory
from runtimes.gpu.kernel_file import cubin_name
from runtimes.gpu.kernel_store import KernelStore
from tests.runtimes.gpu.kernel_files import CUBINS, FIRST, SECOND, write

VALUES = {"B": 3, "S": 100, "scale": 0.5}


class Notebook:
    """Writes down what a GPU would be told."""

    name = "a notebook"

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.loaded: list[tuple[bytes, str, int]] = []
        self.launched: list[tuple[int, Any, Any, list[Any]]] = []

    def load(self, cubin: bytes, symbol: str, shared_bytes: int) -> bytes:
        self.loaded.append((cubin, symbol, shared_bytes))
        return cubin

    def config(self, grid: tuple[int, int, int], threads: int, shared_bytes: int, *, dependent: bool) -> Any:
        return grid, threads, shared_bytes, dependent

    def launch(self, stream: int, config: Any, kernel: Any, arguments: Sequence[Any]) -> None:
        plain = [a.value if isinstance(a, ctypes._SimpleCData) else a for a in arguments]
        self.launched.append((stream, config, kernel, plain))

    def zeros(self, size: int) -> DeviceMemory:
        return DeviceMemory(4096, size, lambda: None)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    made = Notebook(90)
    monkeypatch.setattr(kernel_store, "GpuDevice", lambda: made)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def test_a_call_as_the_gpu_sees_it(folder: Path, notebook: Notebook) -> None:
    call = KernelStore.open(folder).bind("rows", VALUES)
    call.launch(7, {"x": 1 << 20}, workspace=1 << 30, counters=1 << 40)
    x, work, count = 1 << 20, 1 << 30, 1 << 40
    assert notebook.launched == [
        (7, ((2, 3, 1), 128, 50_000, False), CUBINS[0], [x, x + 32, work, count, 300, 1.0, work + 1280, 0]),
        (7, ((2, 3, 1), 128, 50_000, True), CUBINS[1], [x, x + 32, work, count, 300, 1.0, 0, 0]),
    ]
    assert (call.workspace_bytes, call.counter_bytes) == (2048, 256)
    assert call.shapes == {"x": (3, 100, 64), "_part": (3, 100), "_zero_count": (3,)}


def test_a_cubin_is_loaded_once(folder: Path, notebook: Notebook) -> None:
    store = KernelStore.open(folder)
    store.load()
    for size in (1, 2048):
        store.bind("rows", VALUES | {"S": size})
    assert notebook.loaded == [(cubin, "scale_rows", 50_000) for cubin in CUBINS]


def test_a_build_asks_for_sizes_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_store, "GpuDevice", lambda: pytest.fail("a build makes no CUDA call"))
    store = KernelStore.open(folder)
    assert store.workspace_bytes("rows", {"B": 3, "S": 100}) == 2048
    assert store.workspace_bytes("rows") == 4 * 4 * 2048 + 32 * 4 * 128
    assert store.counter_bytes(["rows"]) == 256
    with pytest.raises(BundleError, match="made for `1 <= S <= 2048`, but got 4096"):
        store.workspace_bytes("rows", {"B": 3, "S": 4096})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"S": 2049}, "made for `1 <= S <= 2048`, but got 2049"),
        ({"B": 0}, "made for `1 <= B <= 4`, but got 0"),
        ({"B": None}, "made for `1 <= B <= 4`"),
        ({"scale": None}, "needs a value for scale"),
    ],
)
def test_calls_that_no_kernel_is_made_for(folder: Path, notebook: Notebook, values: dict[str, Any], words: str) -> None:
    given = {name: value for name, value in (VALUES | values).items() if value is not None}
    with pytest.raises(BundleError, match=words):
        KernelStore.open(folder).bind("rows", given)


def test_no_kernel_for_this_gpu(folder: Path, notebook: Notebook) -> None:
    notebook.architecture = 89
    store = KernelStore.open(folder, build_command="gemma3c build --target trt --size 4b")
    with pytest.raises(HostError, match="has kernels for sm_90, sm_120, but a notebook is sm_89") as caught:
        store.load()
    assert caught.value.hint == "build for this GPU: gemma3c build --target trt --size 4b --arch sm_89"


def test_a_cubin_that_was_changed_or_is_gone(folder: Path, notebook: Notebook) -> None:
    (folder / cubin_name(SECOND)).write_bytes(b"\x7fELF third")
    with pytest.raises(BundleError, match="was changed: its hash is"):
        KernelStore.open(folder).load()
    (folder / cubin_name(FIRST)).unlink()
    with pytest.raises(BundleError, match=r"cannot read .*cubin: No such file"):
        KernelStore.open(folder).load()


def test_another_builds_hash(folder: Path) -> None:
    store = KernelStore.open(folder)
    store.check_hash(store.hash, who="the plan")
    with pytest.raises(BundleError, match=r"the plan was built with the kernels 000000000000…, but .*has the hash"):
        store.check_hash("0" * 64, who="the plan")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read .*kernels\.json: No such file"):
        KernelStore.open(tmp_path)
