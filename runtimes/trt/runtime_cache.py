"""Kernels that TensorRT for RTX compiled on this host, kept from one start to the next.

A plan for RTX is compiled for the GPU when it is first run; its runtime cache holds the results. The file lies beside the
bundle, in ``NAME.trt-cache``, or, where that cannot be written, in the user's cache folder. It is named after the plan and
TensorRT's version, and TensorRT itself refuses one of another GPU, driver or version: then it compiles anew.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from runtimes.bundle import Bundle
from runtimes.gpu.kernel_file import hash_of

_SUFFIX = ".trt-cache"


class RuntimeCacheFile:
    """The cache of one plan. ``loaded`` tells whether TensorRT took what was kept.

    Args:
        runtime_cache: TensorRT's, empty.
    """

    def __init__(self, runtime_cache: Any, bundle: Bundle, plan: str, trt: ModuleType | Any) -> None:
        self.runtime_cache = runtime_cache
        digest = bundle.manifest.files[plan].sha256[:16]
        self._name = f"{plan.removesuffix('.plan')}-{digest}-{trt.__version__}.bin"
        self._folders = tuple(_folders(bundle.root))
        self.loaded = False
        self._kept = b""
        for folder in self._folders:
            try:
                data = (folder / self._name).read_bytes()
            except OSError:
                continue
            if runtime_cache.deserialize(data):
                self.loaded, self._kept = True, data
                break

    def save(self) -> Path | None:
        """Writes what there is by now; None where it is what was read, or no folder takes it."""
        serialized = self.runtime_cache.serialize()
        data = b"" if serialized is None else bytes(serialized)
        if not data or data == self._kept:
            return None
        for folder in self._folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write(folder / self._name, data)
            except OSError:
                continue
            self._kept = data
            return folder / self._name
        return None


def _folders(root: Path) -> Iterator[Path]:
    """Where a cache may be, the first choice first."""
    whole = root.resolve()
    yield whole.parent / (whole.name + _SUFFIX)
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield (Path(base) if base else Path.home() / ".cache") / "gemma3c" / "trt" / hash_of(str(whole).encode())[:16]


def _write(path: Path, data: bytes) -> None:
    """All or nothing: two processes may end at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
