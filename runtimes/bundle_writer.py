"""Writing a bundle: aside, whole, then renamed. A reader never sees half of one.

A writer works in ``.NAME.partial-XXXXXXXX`` beside the destination and holds a lock on a file in it for
as long as it lives. A partial folder without a living owner is swept by the next writer to the same
destination.
"""

from __future__ import annotations

import ctypes
import datetime
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from runtimes.bundle import Bundle, hash_file
from runtimes.errors import BundleError, UsageError
from runtimes.manifest import MANIFEST_NAME, FileFacts, Manifest, check_name
from runtimes.progress import SILENT, Progress
from runtimes.units import in_words

_LOCK_NAME = ".lock"
_YOUNG_S = 60.0
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class BundleWriter:
    """Writes a bundle to ``dest``. Leaves all of it there, or nothing.

    >>> with BundleWriter("bundles/270m") as writer:              # doctest: +SKIP
    ...     writer.path("decoder.onnx").write_bytes(graph)
    ...     writer.finish(manifest)

    Args:
        dest: the folder to make.
        overwrite: whether a bundle that is there already is replaced, once the new one is whole. A folder
            that holds anything else is never replaced.

    Raises (on entering):
        UsageError: ``dest`` exists, and ``overwrite`` is off or it is no bundle.
        BundleError: another process is writing to ``dest``, or the disk refuses.
    """

    def __init__(self, dest: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        # `absolute` keeps a last component that is a link visible, where `resolve` would follow it.
        self.dest = Path(dest).absolute()
        self.overwrite = overwrite
        self._known: dict[str, FileFacts] = {}
        self._made_parents: list[Path] = []
        self._folder: Path | None = None
        self._lock: int | None = None
        self._finished = False

    @property
    def folder(self) -> Path:
        """The folder to write into until ``finish``."""
        assert self._folder is not None, "BundleWriter is used outside its `with`"
        return self._folder

    def __enter__(self) -> Self:
        check_destination(self.dest, overwrite=self.overwrite)
        try:
            self._make_parents()
            sweep(self.dest)
            self._folder, self._lock = _claim(self.dest)
            others = [p for p in _partials(self.dest) if p != self._folder]
            if others:
                raise BundleError(
                    f"another process is writing the bundle {self.dest}: {others[0].name} is in use",
                    hint="wait until it is done, or choose another --out",
                )
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise _disk_error(error, self.dest) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._abandon()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_error(error, self.dest) from error

    def path(self, name: str) -> Path:
        """Where to write the file ``name``; its folders are made."""
        check_name(name, place="path")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def reserve(self, size_bytes: int) -> None:
        """Raises BundleError unless the disk has room for ``size_bytes`` more."""
        free = shutil.disk_usage(self.folder).free
        if free < size_bytes:
            raise BundleError(
                f"no disk space for {self.dest}: the bundle needs {in_words(size_bytes)}, but {in_words(free)} are free",
                hint="free some space, or choose an --out on another disk",
            )

    def register(self, name: str, sha256: str, size_bytes: int) -> None:
        """Tells the hash of a file that was hashed while it was written, so that ``finish`` need not read it."""
        check_name(name, place="register")
        self._known[name] = FileFacts(sha256=sha256, bytes=size_bytes)

    def hash(self, name: str, progress: Progress = SILENT) -> str:
        """Hashes the file ``name`` now and registers it; it must not change afterwards."""
        path = self.folder / name
        size = path.stat().st_size
        with progress.task(f"hashing {name}", total=size, unit="bytes") as advance:
            sha256 = hash_file(path, advance)
        self.register(name, sha256, size)
        return sha256

    def finish(self, manifest: Manifest, progress: Progress = SILENT) -> Bundle:
        """Hashes what is left, writes the manifest last, flushes everything and renames.

        Args:
            manifest: without ``files``, which is filled in here.

        Raises:
            BundleError: the manifest names a file that was not written, or ``dest`` appeared meanwhile.
        """
        names = sorted(self._written())
        for name in names:
            if name not in self._known:
                self.hash(name, progress)
            found = (self.folder / name).stat().st_size
            if found != self._known[name].bytes:
                raise BundleError(f"{name} was registered with {self._known[name].bytes} bytes, but has {found}")
        whole = replace(manifest, files={name: self._known[name] for name in names})
        whole.check_references()
        (self.folder / MANIFEST_NAME).write_bytes(whole.dumps())
        (self.folder / _LOCK_NAME).unlink()
        for name in (*names, MANIFEST_NAME):
            _flush(self.folder / name)
        _flush(self.folder)
        self._move_into_place()
        self._finished = True
        self._release()
        return Bundle(self.dest, whole)

    def _written(self) -> Iterator[str]:
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_symlink():
                raise BundleError(f"{name} is a symbolic link, which a bundle never holds")
            if path.is_file() and name not in (_LOCK_NAME, MANIFEST_NAME):
                yield name

    def _move_into_place(self) -> None:
        check_destination(self.dest, overwrite=self.overwrite)
        try:
            if self.dest.exists():
                _exchange(self.folder, self.dest)
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                self.folder.rename(self.dest)
        except OSError as error:
            raise _disk_error(error, self.dest) from error
        _flush(self.dest.parent)

    def _make_parents(self) -> None:
        missing = [p for p in self.dest.parents if not p.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            self._made_parents.insert(0, parent)

    def _abandon(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):
            for parent in self._made_parents:
                parent.rmdir()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def replace_file(bundle: Bundle, name: str, data: bytes) -> Bundle:
    """Adds or replaces a file that no stage needs, such as ``receipt.json``, and lists it in the manifest.

    At every moment the folder is a bundle that opens: the old entry leaves the manifest, the file is
    replaced, the new entry enters.

    Raises:
        BundleError: ``name`` is a graph, the weights or another file that the bundle cannot lack; or the
            folder cannot be written.
    """
    check_name(name, place="replace_file")
    needed = {file for place, file in bundle.manifest.references() if place != "receipt"} | {MANIFEST_NAME}
    if name in needed:
        raise BundleError(f"{name} is a file that the bundle {bundle.root} cannot lack, so it is not replaced in place")
    try:
        with _locked_folder(bundle.root):
            manifest = Bundle.open(bundle.root).manifest
            others = {key: facts for key, facts in manifest.files.items() if key != name}
            is_receipt = name == "receipt.json"
            if name in manifest.files:
                without = replace(manifest, files=others, receipt=None if is_receipt else manifest.receipt)
                _write_through(bundle.root / MANIFEST_NAME, without.dumps())
            (bundle.root / name).parent.mkdir(parents=True, exist_ok=True)
            _write_through(bundle.root / name, data)
            facts = FileFacts(sha256=hash_file(bundle.root / name), bytes=len(data))
            whole = replace(manifest, files={**others, name: facts}, receipt=name if is_receipt else manifest.receipt)
            _write_through(bundle.root / MANIFEST_NAME, whole.dumps())
    except OSError as error:
        raise _disk_error(error, bundle.root) from error
    return Bundle(bundle.root, whole)


def check_destination(dest: Path, *, overwrite: bool) -> None:
    """Raises UsageError unless a bundle may be written to ``dest``: it is free, or a bundle that may be replaced."""
    if dest.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise UsageError(f"{dest} exists and is not a folder", hint="choose another --out")
    if not dest.exists():
        return
    if not overwrite:
        raise UsageError(
            f"{dest} exists already", hint="choose another --out, or pass --overwrite to replace the bundle"
        )
    if any(dest.iterdir()) and not (dest / MANIFEST_NAME).is_file():
        raise UsageError(f"{dest} is not a bundle, so --overwrite does not replace it", hint="choose another --out")


def source_date() -> str | None:
    """SOURCE_DATE_EPOCH as an ISO time, or None where it is not set: equal builds give equal bytes.

    Source: https://reproducible-builds.org/docs/source-date-epoch/
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return None
    try:
        return datetime.datetime.fromtimestamp(int(epoch), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"SOURCE_DATE_EPOCH must be seconds since 1970, but is {epoch!r}") from error


def sweep(dest: Path) -> None:
    """Removes what writers to ``dest`` that died have left."""
    for folder in _partials(dest):
        try:
            lock = os.open(folder / _LOCK_NAME, os.O_RDWR)
        except FileNotFoundError:
            # Just made and not locked yet, or about to be renamed; if neither, then its owner is long dead.
            with suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > _YOUNG_S:
                    shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _partials(dest: Path) -> list[Path]:
    prefix = f".{dest.name}.partial-"
    return [path for path in dest.parent.iterdir() if path.name.startswith(prefix)]


def _claim(dest: Path) -> tuple[Path, int]:
    """A new partial folder and the lock held on it."""
    while True:
        folder = dest.parent / f".{dest.name}.partial-{secrets.token_hex(4)}"
        folder.mkdir()
        lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a sweeper came between the two lines above
            os.close(lock)
            continue
        if (folder / _LOCK_NAME).exists():
            return folder, lock
        os.close(lock)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders: in one step where the kernel can (Linux's renameat2), else in two."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number), str(old))
    aside = new.with_name(f"{new.name}.replaced")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_through(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data`` in one step that survives a crash."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _disk_error(error: OSError, dest: Path) -> BundleError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BundleError(
            f"no disk space left while writing {dest}; nothing was left behind",
            hint="free some space, or choose an --out on another disk",
        )
    return BundleError(f"cannot write {dest}: {error.strerror}", hint="check the permissions of the folder")
