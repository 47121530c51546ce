"""Opening a bundle: a folder with ``manifest.json`` and the files that it names.

Nothing here trusts the folder: names stay inside it, symbolic links are refused, sizes are compared at
opening and hashes by ``verify``.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import BundleError
from runtimes.manifest import MANIFEST_NAME, Manifest
from runtimes.progress import SILENT, Advance, Progress

MAX_MANIFEST_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
_REBUILD = "copy or build the bundle again"


@dataclass(frozen=True)
class Verification:
    """What ``Bundle.verify`` went through: ``unlisted`` are files that the manifest does not name."""

    files: int
    bytes: int
    unlisted: tuple[str, ...]


class Bundle:
    """An opened bundle. ``root`` is its folder, ``manifest`` what it says of itself.

    >>> bundle = Bundle.open("bundles/270m")            # doctest: +SKIP
    >>> bundle.path(bundle.manifest.weights.file)       # doctest: +SKIP
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Reads the manifest and compares each file's presence, kind and size with it.

        Raises:
            BundleError: there is no bundle, it is for a newer version, a file is missing or of another
                size, or a path would leave the folder.
        """
        root = Path(path)
        manifest = _read_manifest(root)
        manifest.check_references()
        problems = [problem for name, facts in manifest.files.items() if (problem := _check(root, name, facts.bytes))]
        if problems:
            raise BundleError(f"the bundle {root} is not whole: {'; '.join(problems)}", hint=_REBUILD)
        return cls(root, manifest)

    def path(self, name: str) -> Path:
        """Where the file ``name`` lies; raises BundleError if the manifest does not list it."""
        if name not in self.manifest.files and name != MANIFEST_NAME:
            raise BundleError(f"the bundle {self.root} lists no file {name!r}; it has {', '.join(self.manifest.files)}")
        return self.root / name

    def verify(self, progress: Progress = SILENT) -> Verification:
        """Hashes every file again.

        Raises:
            BundleError: names each file whose bytes are not those that were written.
        """
        files = self.manifest.files
        total = sum(facts.bytes for facts in files.values())
        problems = []
        with progress.task("verifying", total=total, unit="bytes") as advance:
            for name, facts in files.items():
                problem = _check(self.root, name, facts.bytes)
                if problem is None:
                    found = hash_file(self.root / name, advance)
                    if found != facts.sha256:
                        problem = f"{name}: expected sha256 {facts.sha256[:12]}…, but got {found[:12]}…"
                if problem is not None:
                    problems.append(problem)
        if problems:
            raise BundleError(f"the bundle {self.root} was changed: {'; '.join(problems)}", hint=_REBUILD)
        return Verification(len(files), total, self._unlisted())

    def _unlisted(self) -> tuple[str, ...]:
        found = (p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_symlink() or not p.is_dir())
        return tuple(sorted(set(found) - set(self.manifest.files) - {MANIFEST_NAME}))


def hash_file(path: Path, advance: Advance | None = None) -> str:
    """The sha256 of a file in hexadecimal, read in blocks. ``advance`` is told the bytes of each block."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
                if advance is not None:
                    advance(count)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}", hint="check the permissions and the disk") from error
    return digest.hexdigest()


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST_NAME
    if not root.exists():
        raise BundleError(
            f"there is no bundle at {root}: no such folder", hint="build one: gemma3c build --size 270m --out FOLDER"
        )
    if not root.is_dir():
        raise BundleError(
            f"{root} is a file, but a bundle is a folder", hint=f"name the folder that holds {MANIFEST_NAME}"
        )
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise BundleError(f"{path} must be a plain file, but is {_kind(mode)}", hint=_REBUILD)
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise BundleError(
            f"{root} is not a bundle: it has no {MANIFEST_NAME}", hint="name a folder that `gemma3c build` wrote"
        ) from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}", hint="check the permissions and the disk") from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes, which no manifest is", hint=_REBUILD)
    return Manifest.loads(text, where=str(path))


def _check(root: Path, name: str, expected_bytes: int) -> str | None:
    """Why ``name`` is not the plain file of ``expected_bytes`` that the manifest promises; None if it is."""
    path = root
    try:
        for part in name.split("/"):
            path = path / part
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                return f"{name}: {path.relative_to(root)} is a symbolic link, which is refused"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name}: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return f"{name} must be a plain file, but is {_kind(found.st_mode)}"
    if found.st_size != expected_bytes:
        return f"{name}: expected {expected_bytes} bytes, but got {found.st_size}"
    return None


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    return "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
