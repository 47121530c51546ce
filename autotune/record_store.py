"""Which tuned configuration a kernel runs with: records shipped with gemma3c, and the user's own before them.

Where they are: one JSON file a GPU model, in ``autotune/records/`` of this package and in the user's folder,
``$GEMMA3C_RECORDS`` or else ``$XDG_CONFIG_HOME/gemma3c/records`` (``~/.config/gemma3c/records``).

What is chosen, for a kernel, a case and a GPU; a user's record goes before a shipped one at each step:

1. A record of this GPU model, made with these sources and this Triton.
2. One of this GPU model made with other sources or another Triton: a good guess, with a warning.
3. One of a GPU with the same major compute capability, the number of multiprocessors nearest, with a warning.
4. The kernel's own heuristic, with a warning.

A configuration that was made with other sources or another Triton must still be one of the kernel's search space, and
whatever the step the kernel must not refuse it on this GPU.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from autotune import record_file
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Kernel, Space
from autotune.record_file import GpuModel, Record, RecordError, Records
from autotune.record_folders import default_folder, shipped_files, user_files
from runtimes.errors import UsageError

__all__ = [
    "Choice",
    "Imported",
    "Record",
    "RecordError",
    "RecordStore",
    "default_folder",
    "source_hash",
    "triton_version",
]

Origin = Literal["user", "shipped", "heuristic"]
MENDED = "`gemma3c tune` mends it"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The configuration to run with.

    Args:
        config: the record's, or the kernel's heuristic.
        record: None for the heuristic.
        origin: whose record it is.
        tuned_here: the record is of this GPU model, these sources and this Triton.
        warnings: what is less than it could be, each in words that are equal for all cases of one reason.
    """

    config: Config
    record: Record | None
    origin: Origin
    tuned_here: bool
    warnings: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """All warnings in one line, or None."""
        return "; ".join(self.warnings) or None


@dataclass(frozen=True, kw_only=True)
class Imported:
    """How many records an import added, replaced by faster ones, and left as they were."""

    added: int
    replaced: int
    kept: int


@cache
def source_hash(kernel: Kernel) -> str:
    """Sixteen hex digits of the text of the kernel's ``source`` modules, comments included, line endings not."""
    digest = sha256()
    for module in kernel.source:
        spec = util.find_spec(module)
        assert spec is not None and spec.origin is not None, f"{kernel.name}: there is no source for {module}"
        digest.update(b"\0".join((module.encode(), Path(spec.origin).read_bytes().replace(b"\r\n", b"\n"), b"")))
    return digest.hexdigest()[:16]


@cache
def triton_version() -> str:
    """The installed version of Triton."""
    return metadata.version("triton")


class RecordStore:
    """Records of a user and those that are shipped. Files are read once and kept, until :meth:`put` or an import.

    Args:
        user_folder: None takes the host's.
        shipped_folder: None takes the package's.
    """

    def __init__(self, user_folder: Path | None = None, *, shipped_folder: Path | None = None) -> None:
        self.folder = user_folder or default_folder()
        self._shipped = shipped_folder
        self._read: dict[Origin, Records] = {}
        self.damage: tuple[str, ...] = ()
        """What is wrong with the user's files; they are passed over, and the shipped records stand."""

    def best(self, kernel: Kernel, case: Case, gpu: Gpu) -> Choice:
        """The configuration for a case, by the rules at the head of this module.

        Raises:
            RecordError: a shipped file is damaged.
        """
        wanted = (kernel.name, case.dtype, kernel.bucket(case))
        mine = GpuModel.of(gpu)
        for model, record, origin in self._candidates(wanted, kernel, mine):
            current = (record.source_hash, record.triton) == (source_hash(kernel), triton_version())
            space = kernel.space(case)
            if record.config.constants.keys() != space.constants.keys():
                continue
            if not (current or _in_space(space, record.config)) or kernel.refusal(case, record.config, gpu):
                continue
            here = model.name == mine.name
            return Choice(
                config=record.config,
                record=record,
                origin=origin,
                tuned_here=here and current,
                warnings=self._warned(_reason(kernel, gpu, model.name, record, current)),
            )
        reason = f"some shapes have no tuning record for {gpu.name} and run as heuristics say; {MENDED}"
        return Choice(
            config=kernel.default(case, gpu),
            record=None,
            origin="heuristic",
            tuned_here=False,
            warnings=self._warned(reason),
        )

    def records(self, origin: Literal["user", "shipped"]) -> Records:
        """All records of one kind, by GPU model. A user's damaged file counts as empty, and is noted in ``damage``."""
        if origin not in self._read:
            self._read[origin] = self._user_records() if origin == "user" else self._shipped_records()
        return self._read[origin]

    def put(self, record: Record, gpu: Gpu, *, only_if_faster: bool = False) -> bool:
        """Writes a record into the user's file of this GPU model, whatever other processes write meanwhile.

        Records with another kernel, source hash, Triton version, dtype or bucket stay as they are.

        Args:
            only_if_faster: leaves a record of the same key that has a smaller time.

        Returns:
            whether it was written.

        Raises:
            RecordError: the file is damaged, or another GPU's; it is left as it is.
        """
        result = self._merge(GpuModel.of(gpu), [record], only_if_faster=only_if_faster)
        return result.kept == 0

    def check_writable(self, gpu: Gpu) -> None:
        """Fails now where :meth:`put` would fail after hours of tuning: RecordError or OSError."""
        self._merge(GpuModel.of(gpu), [], only_if_faster=False)

    def export(self, path: Path) -> int:
        """Writes the user's records of all GPU models into one file; returns how many they are.

        Raises:
            UsageError: there are none, or ``path`` holds something that is no file of records.
            RecordError: one of the user's files is damaged.
        """
        records: Records = {}
        for file in user_files(self.folder):
            records |= record_file.read(file)
        count = sum(map(len, records.values()))
        if count == 0:
            raise UsageError(f"there are no records in {self.folder}", hint="`gemma3c tune` makes some")
        if path.exists():
            try:
                record_file.read(path)
            except (RecordError, OSError) as error:
                raise UsageError(
                    f"{path} exists and is no file of tuning records, so it is not overwritten", hint="name another"
                ) from error
        record_file.write(path, dict(sorted(records.items(), key=lambda item: item[0].name)))
        return count

    def import_(self, path: Path) -> Imported:
        """Takes over the records of an exported file; of two with one key the faster stays.

        Raises:
            RecordError: ``path`` is damaged or something else; nothing was taken over.
        """
        counts = [
            self._merge(model, list(records.values()), only_if_faster=True)
            for model, records in record_file.read(path).items()
        ]
        return Imported(
            added=sum(c.added for c in counts),
            replaced=sum(c.replaced for c in counts),
            kept=sum(c.kept for c in counts),
        )

    def _candidates(
        self, wanted: tuple[str, str, str], kernel: Kernel, mine: GpuModel
    ) -> Iterator[tuple[GpuModel, Record, Origin]]:
        """Records of the wanted kernel, dtype and bucket, the one to prefer first."""
        environment = (source_hash(kernel), triton_version())
        found: list[tuple[tuple[object, ...], GpuModel, Record, Origin]] = []
        for origin in ("user", "shipped"):
            for model, records in self.records(origin).items():
                if not model.is_similar(mine):
                    continue
                for record in records.values():
                    if (record.kernel, record.dtype, record.bucket) == wanted:
                        stale = (record.source_hash, record.triton) != environment
                        rank = (*mine.distance(model), stale, origin == "shipped", _newest_first(record.when))
                        found.append((rank, model, record, origin))
        for _, model, record, origin in sorted(found, key=lambda entry: entry[0]):
            yield model, record, origin

    def _user_records(self) -> Records:
        records: Records = {}
        damage = []
        for file in user_files(self.folder):
            try:
                _merge_into(records, record_file.read(file))
            except RecordError as error:
                damage.append(f"{error.message}; its records are not used")
            except OSError as error:
                damage.append(f"{file} cannot be read: {error.strerror}; its records are not used")
        self.damage = tuple(damage)
        return records

    def _shipped_records(self) -> Records:
        records: Records = {}
        with ExitStack() as stack:
            for file in shipped_files(stack, self._shipped):
                _merge_into(records, record_file.read(file))
        return records

    def _warned(self, reason: str | None) -> tuple[str, ...]:
        return (*self.damage, *([reason] if reason else []))

    def _merge(self, model: GpuModel, incoming: Sequence[Record], *, only_if_faster: bool) -> Imported:
        path = self.folder / f"{_slug(model.name)}.json"
        added = replaced = kept = 0
        with _locked(path):
            records = record_file.read(path) if path.exists() else {}
            if foreign := [other.name for other in records if other.name != model.name]:
                raise RecordError(
                    f"{path} holds records of {foreign[0]}, where those of {model.name} were expected",
                    hint="give the file another name; all .json files of the folder are read",
                )
            mine = {key: known for part in records.values() for key, known in part.items()}
            for record in incoming:
                known = mine.get(record.key)
                if known is not None and only_if_faster and known.time_us <= record.time_us:
                    kept += 1
                    continue
                added, replaced = added + (known is None), replaced + (known is not None)
                mine[record.key] = record
            if added or replaced:
                record_file.write(path, {model: mine})
        self._read.pop("user", None)
        return Imported(added=added, replaced=replaced, kept=kept)


def _merge_into(records: Records, more: Records) -> None:
    for model, found in more.items():
        records.setdefault(model, {}).update(found)


def _newest_first(when: str) -> tuple[int, ...]:
    return tuple(-ord(letter) for letter in when)


def _in_space(space: Space, config: Config) -> bool:
    return (
        all(value in space.constants[name] for name, value in config.constants.items())
        and config.num_warps in space.num_warps
        and config.num_stages in space.num_stages
    )


def _reason(kernel: Kernel, gpu: Gpu, model: str, record: Record, current: bool) -> str | None:
    if model != gpu.name:
        return f"there are no tuning records for {gpu.name}: those of {model} stand in; {MENDED}"
    if current:
        return None
    what = "with other sources" if record.source_hash != source_hash(kernel) else f"for Triton {record.triton}"
    return f"{kernel.name} was tuned {what}: its record is a guess now; {MENDED}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that all processes of this host (and of a shared file system that has locks) respect."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
