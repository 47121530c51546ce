"""Tuning records as they stand in a file: parsed with errors that name the place, written whole or not at all.

    {"format": "gemma3c tuning records", "version": 1,
     "gpus": [{"name": …, "compute_capability": [9, 0], "multiprocessors": 132, "records": [{…}, …]}]}

``autotune/records/README.md`` says what each field is; ``schema.json`` beside it says it for programs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.gpu_model import GpuModel
from autotune.kernel import Case, Config
from runtimes.errors import Gemma3CompileError

__all__ = ["GpuModel", "Key", "Record", "RecordError", "Records", "Timed", "as_json", "parse", "read", "write"]

FORMAT = "gemma3c tuning records"
VERSION = 1


class RecordError(Gemma3CompileError):
    """A file of tuning records is damaged, or is something else."""


Timed = tuple[Config, float]
"""A configuration and its time in microseconds."""
Key = tuple[str, str, str, str, str]
"""Kernel, source hash, Triton version, dtype, bucket."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The best configuration that a study found for a bucket.

    Args:
        kernel: its name in the registry.
        source_hash: of the modules that decide the kernel's result, as :func:`record_store.source_hash` gives it.
        triton: Triton's version.
        dtype, bucket: what the configuration is for.
        config, time_us: the best configuration, and its time.
        runner_up: the second best and its time.
        roofline: the share of the floor that the best reaches: floor / time.
        case: what was measured.
        when: ISO 8601, UTC.
        driver: NVIDIA's version.
    """

    kernel: str
    source_hash: str
    triton: str
    dtype: str
    bucket: str
    config: Config
    time_us: float
    runner_up: Timed | None
    roofline: float
    case: Case
    when: str
    driver: str

    @property
    def key(self) -> Key:
        """What a file holds at most one record of."""
        return (self.kernel, self.source_hash, self.triton, self.dtype, self.bucket)


Records = dict[GpuModel, dict[Key, Record]]


def read(path: Path) -> Records:
    """The records of a file.

    Raises:
        RecordError: it is not a file of records, or a field is missing or of another type; the message names both.
        OSError: it cannot be read.
    """
    try:
        return parse(json.loads(path.read_bytes()), str(path))
    except ValueError as error:  # not JSON, or not UTF-8
        raise RecordError(
            f"{path} is not JSON: {error}", hint="move the file away; `gemma3c tune` makes a new one"
        ) from error


def parse(content: Any, where: str) -> Records:
    """The records of a parsed JSON value; ``where`` is named in errors."""
    top = _Place(where, content)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecordError(
            f'{where} is not a file of tuning records: "format": "{FORMAT}" was expected, {_shown(content)} came',
            hint="`gemma3c tune --export` writes such files",
        )
    version = top.get("version", int)
    if version != VERSION:
        raise RecordError(
            f"{where} has version {version} of the format, but this gemma3c reads version {VERSION}",
            hint="a newer gemma3c may have written it",
        )
    records: Records = {}
    for place in top.items("gpus"):
        major, minor = place.get("compute_capability", list, length=2)
        model = GpuModel(
            name=place.get("name", str),
            compute_capability=(_Place(place.where, major).whole(), _Place(place.where, minor).whole()),
            multiprocessors=place.get("multiprocessors", int),
        )
        mine = records.setdefault(model, {})
        for item in place.items("records"):
            record = _record(item)
            if record.key in mine:
                raise RecordError(f"{item.where} repeats the record of {', '.join(record.key)}")
            mine[record.key] = record
    return records


def write(path: Path, records: Records) -> None:
    """Writes a file, sorted, in one step: another process sees the old file or the new one."""
    content = {"format": FORMAT, "version": VERSION, "gpus": [as_json(model, records[model]) for model in records]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp's 0600 would hide it from the other users of a shared folder
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def as_json(model: GpuModel, records: Mapping[Key, Record]) -> dict[str, Any]:
    """One GPU's part of a file."""
    return {
        "name": model.name,
        "compute_capability": list(model.compute_capability),
        "multiprocessors": model.multiprocessors,
        "records": [_record_json(records[key]) for key in sorted(records)],
    }


def _record_json(record: Record) -> dict[str, Any]:
    return {
        "kernel": record.kernel,
        "source_hash": record.source_hash,
        "triton": record.triton,
        "dtype": record.dtype,
        "bucket": record.bucket,
        "config": _config_json(record.config),
        "time_us": record.time_us,
        "runner_up": None
        if record.runner_up is None
        else {"config": _config_json(record.runner_up[0]), "time_us": record.runner_up[1]},
        "roofline": record.roofline,
        "case": {"dtype": record.case.dtype, "dims": dict(record.case.dims)},
        "when": record.when,
        "driver": record.driver,
    }


def _config_json(config: Config) -> dict[str, Any]:
    return {"constants": dict(config.constants), "num_warps": config.num_warps, "num_stages": config.num_stages}


def _record(place: _Place) -> Record:
    case = place.inside("case")
    runner_up = None if place.get("runner_up", dict, optional=True) is None else place.inside("runner_up")
    return Record(
        kernel=place.get("kernel", str),
        source_hash=place.get("source_hash", str),
        triton=place.get("triton", str),
        dtype=place.get("dtype", str),
        bucket=place.get("bucket", str),
        config=_config(place.inside("config")),
        time_us=place.number("time_us"),
        runner_up=None if runner_up is None else (_config(runner_up.inside("config")), runner_up.number("time_us")),
        roofline=place.number("roofline"),
        case=Case(dtype=case.get("dtype", str), dims=case.inside("dims").integers()),
        when=place.get("when", str),
        driver=place.get("driver", str),
    )


def _config(place: _Place) -> Config:
    return Config(
        constants=place.inside("constants").integers(),
        num_warps=place.get("num_warps", int),
        num_stages=place.get("num_stages", int),
    )


class _Place:
    """A value of a file, and where it stands, for errors."""

    def __init__(self, where: str, value: Any) -> None:
        self.where = where
        self.value = value

    def get(self, name: str, kind: type, *, length: int | None = None, optional: bool = False) -> Any:
        """A field of an object, checked."""
        if not isinstance(self.value, dict):
            raise self.unfit("an object", self.value)
        if name not in self.value:
            raise RecordError(f"{self.where} lacks the field `{name}`")
        value = self.value[name]
        if optional and value is None:
            return None
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits or (length is not None and len(value) != length):
            raise _Place(f"{self.where}, `{name}`", value).unfit(_KINDS[kind], value)
        return value

    def number(self, name: str) -> float:
        """A field that is a positive, finite number."""
        value = self.get(name, int if isinstance(self.value.get(name), int) else float)
        if not 0 < value < float("inf"):
            raise _Place(f"{self.where}, `{name}`", value).unfit("a positive number", value)
        return float(value)

    def whole(self) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.unfit("an integer", self.value)
        return self.value

    def inside(self, name: str) -> _Place:
        """A field that is an object."""
        return _Place(f"{self.where}, `{name}`", self.get(name, dict))

    def items(self, name: str) -> Sequence[_Place]:
        """The members of a field that is a list."""
        return [_Place(f"{self.where}, {name}[{i}]", value) for i, value in enumerate(self.get(name, list))]

    def integers(self) -> dict[str, int]:
        """An object of integers."""
        return {name: _Place(f"{self.where}, `{name}`", value).whole() for name, value in self.value.items()}

    def unfit(self, expected: str, came: Any) -> RecordError:
        return RecordError(f"{self.where} must be {expected}, but is {_shown(came)}")


_KINDS = {int: "an integer", str: "a text", list: "a list", dict: "an object", float: "a number"}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
