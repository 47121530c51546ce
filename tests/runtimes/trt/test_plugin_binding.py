"""Finding TensorRT: which flavour is taken, what is said where there is none, and the library that RTX's wheel lacks."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib import util
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from runtimes.errors import HostError
from runtimes.trt import binding


@pytest.fixture(autouse=True)
def _in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing loaded. What other tests of this process have loaded must stay: the parser opens its links later."""
    for name in ("_load", "_links"):
        monkeypatch.setattr(binding, name, cache(getattr(binding, name).__wrapped__))


class Host:
    """Which packages there are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.specs: dict[str, ModuleSpec] = {}
        monkeypatch.setattr(util, "find_spec", lambda name: self.specs.get(name))

    def has(self, name: str, origin: Path | None = None, **attributes: Any) -> ModuleType:
        self.specs[name] = ModuleSpec(name, None, origin=None if origin is None else str(origin))
        module = ModuleType(name)
        vars(module).update(attributes)
        self.monkeypatch.setitem(sys.modules, name, module)
        return module


class Preview:
    ALIASED_PLUGIN_IO_10_03 = 1


NEW: dict[str, Any] = {"IPluginV3OneBuildV2": object, "PreviewFeature": Preview, "__version__": "11.4"}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_what_is_installed_is_taken(host: Host) -> None:
    full = host.has("tensorrt", **NEW)
    assert binding.load() is full
    rtx = host.has("tensorrt_rtx", **NEW)
    assert binding.load() is rtx  # of two the one that builds without a GPU
    assert binding.load("full") is full


def test_neither_is_installed(host: Host) -> None:
    with pytest.raises(HostError, match="TensorRT is not installed") as caught:
        binding.load()
    for words in ("gemma3-compile[trt-rtx]' for GPUs of sm_80", "gemma3-compile[trt]' for sm_90"):
        assert words in str(caught.value.hint)


def test_the_other_one_is_installed(host: Host) -> None:
    host.has("tensorrt_rtx", **NEW)
    with pytest.raises(HostError, match="the package tensorrt is not installed") as caught:
        binding.load("full")
    assert caught.value.hint == "pip install 'gemma3-compile[trt]'"


def test_an_old_one(host: Host) -> None:
    host.has("tensorrt", __version__="8.6")
    with pytest.raises(HostError, match=r"tensorrt 8\.6 is too old: 11\.0 or newer is needed"):
        binding.load("full")


def test_one_that_cannot_be_imported(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.has("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(HostError, match="tensorrt is installed, but cannot be imported"):
        binding.load("full")


def wheel(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return folder / "__init__.py"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    paths: list[Path] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path: paths.append(Path(path)))
    return paths


def test_the_library_that_the_wheel_lacks(host: Host, tmp_path: Path, opened: list[Path]) -> None:
    libraries = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
    host.has("tensorrt_rtx", **NEW)
    host.has("tensorrt_rtx_libs", wheel(tmp_path / "libs", *libraries))
    binding.load("rtx")
    assert [path.name for path in opened] == list(libraries)
    (beside,) = {path.parent for path in opened}
    assert (beside / "libtensorrt_rtx.so").resolve() == tmp_path / "libs" / "libtensorrt_rtx.so.1"
    binding.load("rtx")
    assert len(opened) == 2


def test_a_wheel_that_lacks_nothing_is_left_alone(host: Host, tmp_path: Path, opened: list[Path]) -> None:
    names = ("libtensorrt_rtx.so", "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
    host.has("tensorrt_rtx", **NEW)
    host.has("tensorrt_rtx_libs", wheel(tmp_path / "libs", *names))
    binding.load("rtx")
    assert opened == []
