"""Records: what is chosen where, what is kept through writers at once, and what a damaged file gets."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest

from autotune import record_file
from autotune.gpu import GPUS, Gpu
from autotune.kernel import Case, Config, Kernel
from autotune.kernels.rms_norm import RmsNorm
from autotune.record_file import GpuModel, Records
from autotune.record_folders import summary
from autotune.record_store import Record, RecordError, RecordStore, default_folder, source_hash, triton_version
from runtimes.errors import UsageError

KERNEL = RmsNorm()
CASE = Case(dtype="bfloat16", dims={"rows": 8, "hidden": 640, "residual": 1})
H100 = GPUS["h100"]
SHIPPED = Path(record_file.__file__).parent / "records"
SCHEMA = json.loads((SHIPPED / "schema.json").read_text())


def config(block: int = 2, warps: int = 8, dependent: int = 1) -> Config:
    return Config(constants={"BLOCK_ROWS": block, "DEPENDENT": dependent}, num_warps=warps, num_stages=1)


def record(**changes: Any) -> Record:
    """A record of this host's sources and Triton."""
    made = Record(
        kernel="rms_norm",
        source_hash=source_hash(KERNEL),
        triton=triton_version(),
        dtype="bfloat16",
        bucket=KERNEL.bucket(CASE),
        config=config(),
        time_us=10.0,
        runner_up=(config(4), 11.5),
        roofline=0.5,
        case=CASE,
        when="2026-01-01T00:00:00Z",
        driver="580.65",
    )
    return dataclasses.replace(made, **changes)


def shipped(folder: Path, *pairs: tuple[Gpu, Record]) -> Path:
    """A folder as the package ships it."""
    for gpu, made in pairs:
        path = folder / f"{gpu.name}.json"
        records = record_file.read(path) if path.exists() else {}
        records.setdefault(GpuModel.of(gpu), {})[made.key] = made
        record_file.write(path, records)
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> RecordStore:
    """No shipped records, an empty user's folder."""
    return RecordStore(tmp_path / "mine", shipped_folder=shipped(tmp_path / "shipped"))


def store(tmp_path: Path, *pairs: tuple[Gpu, Record]) -> RecordStore:
    return RecordStore(tmp_path / "mine", shipped_folder=shipped(tmp_path / "shipped", *pairs))


def test_shipped_files_hold_to_the_schema_and_to_the_parser() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for path in SHIPPED.glob("*.json"):
        if path.name != "schema.json":
            jsonschema.validate(json.loads(path.read_text()), SCHEMA)
            [model] = record_file.read(path)
            assert path.name == f"{re.sub('[^a-z0-9]+', '-', model.name.lower())}.json", (
                "one GPU model's, named after it"
            )


def test_a_record_goes_to_a_file_and_back(mine: RecordStore) -> None:
    for made in (record(), record(dtype="float32", runner_up=None)):
        assert mine.put(made, H100)
        assert mine.records("user")[GpuModel.of(H100)][made.key] == made
    (file,) = mine.folder.glob("*.json")
    assert file.name == "nvidia-h100-80gb-hbm3.json"
    jsonschema.validate(json.loads(file.read_text()), SCHEMA)


def test_without_records_the_heuristic_runs_and_says_so(mine: RecordStore) -> None:
    choice = mine.best(KERNEL, CASE, H100)
    assert (choice.config, choice.record, choice.origin) == (KERNEL.default(CASE, H100), None, "heuristic")
    assert choice.warning is not None and "`gemma3c tune` mends it" in choice.warning


def test_a_user_record_goes_before_a_shipped_one(tmp_path: Path) -> None:
    both = store(tmp_path, (H100, record(config=config(1))))
    assert both.best(KERNEL, CASE, H100).origin == "shipped"
    both.put(record(config=config(4), time_us=99.0), H100)
    choice = both.best(KERNEL, CASE, H100)
    assert (choice.origin, choice.config, choice.tuned_here, choice.warning) == ("user", config(4), True, None)


def test_another_bucket_or_dtype_is_not_taken(mine: RecordStore) -> None:
    mine.put(record(bucket="another"), H100)
    mine.put(record(dtype="float32"), H100)
    assert mine.best(KERNEL, CASE, H100).origin == "heuristic"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"source_hash": "0" * 16}, "with other sources"), ({"triton": "3.0.0"}, "for Triton 3.0.0")],
)
def test_a_stale_record_is_used_with_a_warning(mine: RecordStore, changes: dict[str, str], reason: str) -> None:
    mine.put(record(**changes), H100)
    choice = mine.best(KERNEL, CASE, H100)
    assert (choice.config, choice.origin, choice.tuned_here) == (config(), "user", False)
    assert choice.warning is not None and reason in choice.warning and "gemma3c tune" in choice.warning


def test_a_shipped_record_of_these_sources_goes_before_a_users_stale_one(tmp_path: Path) -> None:
    both = store(tmp_path, (H100, record(config=config(1))))
    both.put(record(config=config(4), triton="3.0.0"), H100)
    assert both.best(KERNEL, CASE, H100).config == config(1)


def test_the_newest_of_two_stale_records_is_taken(mine: RecordStore) -> None:
    mine.put(record(triton="3.0.0", config=config(1), when="2025-01-01T00:00:00Z"), H100)
    mine.put(record(triton="2.9.0", config=config(4), when="2025-06-01T00:00:00Z"), H100)
    assert mine.best(KERNEL, CASE, H100).config == config(4)


@pytest.mark.parametrize(
    "lost",
    [
        config(3),
        dataclasses.replace(config(), num_stages=2),
        Config(constants={"ROWS": 2}, num_warps=8, num_stages=1),
    ],
)
def test_a_stale_record_outside_of_the_space_is_not_used(mine: RecordStore, lost: Config) -> None:
    mine.put(record(config=lost, triton="3.0.0"), H100)
    assert mine.best(KERNEL, CASE, H100).origin == "heuristic"


def test_what_the_kernel_refuses_there_is_not_used(mine: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    mine.put(record(), H100)

    def refusal(self: Kernel, case: Case, tried: Config, gpu: Gpu) -> str | None:
        return "too large" if tried == config() and gpu.architecture == 90 else None

    monkeypatch.setattr(RmsNorm, "refusal", refusal)
    assert mine.best(KERNEL, CASE, H100).origin == "heuristic"


def test_an_unknown_gpu_takes_the_nearest_of_its_architecture(tmp_path: Path) -> None:
    ada = partial(config, dependent=0)
    near, far = GPUS["rtx4090"], GPUS["l4"]  # 128 and 58 multiprocessors
    pairs = [(near, record(config=ada(1))), (far, record(config=ada(2))), (H100, record(config=config(4)))]
    both = store(tmp_path, *pairs)
    unknown = dataclasses.replace(GPUS["rtx3090"], name="NVIDIA RTX 9999", multiprocessors=90)
    choice = both.best(KERNEL, CASE, unknown)
    assert choice.config == ada(2)
    assert choice.warning is not None and "those of NVIDIA L4 stand in; `gemma3c tune` mends it" in choice.warning
    assert both.best(KERNEL, CASE, dataclasses.replace(unknown, multiprocessors=94)).config == ada(1)
    assert both.best(KERNEL, CASE, GPUS["rtx5090"]).origin == "heuristic"


def test_other_environments_stay_beside(mine: RecordStore) -> None:
    others = [record(triton="3.0.0"), record(source_hash="0" * 16), record(kernel="gone"), record(dtype="float32")]
    for made in [*others, record(), record(time_us=9.0)]:
        mine.put(made, H100)
    kept = mine.records("user")[GpuModel.of(H100)]
    assert list(kept.values()) == sorted([*others, record(time_us=9.0)], key=lambda made: made.key)


def test_the_summary_counts_what_the_store_would_take(tmp_path: Path) -> None:
    def said(gpu: Gpu) -> str:
        model = GpuModel.of(gpu)
        return summary(model, user_folder=tmp_path / "mine", shipped_folder=tmp_path / "shipped")

    both = store(tmp_path, (H100, record()), (H100, record(dtype="float32")), (GPUS["l4"], record()))
    both.put(record(), GPUS["rtx4090"])
    both.put(record(triton="3.0.0"), H100)
    assert said(H100) == f"3 records of {H100.name} (2 shipped, 1 your own)"
    assert (
        said(GPUS["h200"]) == f"no records of NVIDIA H200, 3 records of {H100.name} stand in; `gemma3c tune` makes some"
    )
    assert said(GPUS["a10"]) == "no records of NVIDIA A10, 1 record of NVIDIA L4 stand in; `gemma3c tune` makes some"
    assert said(GPUS["b200"]) == "no records of NVIDIA B200 or a similar GPU; `gemma3c tune` makes some"


def test_a_slower_record_may_be_left_out(mine: RecordStore) -> None:
    assert mine.put(record(time_us=10.0), H100, only_if_faster=True)
    assert not mine.put(record(time_us=12.0), H100, only_if_faster=True)
    assert mine.put(record(time_us=8.0), H100, only_if_faster=True)
    choice = mine.best(KERNEL, CASE, H100)
    assert choice.record is not None and choice.record.time_us == 8.0


_WRITER = """
import sys; from pathlib import Path; from tests.autotune.test_records import H100, RecordStore, record
store = RecordStore(Path(sys.argv[1]))
for i in range(20):
    store.put(record(bucket=f"{sys.argv[2]} {i}"), H100)
"""


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "mine")]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    (records,) = RecordStore(tmp_path / "mine").records("user").values()
    assert len(records) == 60


def test_a_write_that_fails_leaves_the_file_as_it_was(mine: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    mine.put(record(), H100)
    (file,) = mine.folder.glob("*.json")
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        mine.put(record(time_us=1.0), H100)
    assert file.read_bytes() == before
    assert sorted(path.name for path in mine.folder.iterdir()) == [f".{file.name}.lock", file.name]


GOOD = {"format": record_file.FORMAT, "version": 1, "gpus": []}
DAMAGED = [
    (b"{", "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    (b"[]", '"format": "gemma3c tuning records" was expected, \\[\\] came'),
    (b'{"format": "something else"}', "is not a file of tuning records"),
    (json.dumps(GOOD | {"version": 2}).encode(), "has version 2 of the format, but this gemma3c reads version 1"),
    (json.dumps(GOOD | {"gpus": {}}).encode(), "`gpus` must be a list, but is {}"),
    (json.dumps(GOOD | {"gpus": [{}]}).encode(), r"gpus\[0\] lacks the field `compute_capability`"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED)
def test_a_damaged_file_is_named_and_passed_over(tmp_path: Path, content: bytes, message: str) -> None:
    both = store(tmp_path, (H100, record()))
    both.folder.mkdir()
    file = both.folder / "nvidia-h100-80gb-hbm3.json"
    file.write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        record_file.read(file)
    assert str(file) in caught.value.message
    choice = both.best(KERNEL, CASE, H100)
    assert (choice.origin, choice.tuned_here) == ("shipped", True)
    assert choice.warning is not None and str(file) in choice.warning and "its records are not used" in choice.warning
    for write in (lambda: both.put(record(), H100), lambda: both.check_writable(H100)):
        with pytest.raises(RecordError, match=message):
            write()
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kernel", 3, r"records\[0\], `kernel` must be a text, but is 3"),
        ("time_us", -1, "`time_us` must be a positive number, but is -1"),
        ("time_us", float("nan"), "`time_us` must be a positive number, but is NaN"),
        ("time_us", True, "`time_us` must be an integer, but is true"),
        ("config", {"constants": {"A": "x"}}, '`config`, `constants`, `A` must be an integer, but is "x"'),
        ("runner_up", {"config": {}}, "`runner_up`, `config` lacks the field `constants`"),
        ("case", [], r"`case` must be an object, but is \[\]"),
    ],
)
def test_a_wrong_field_is_named(mine: RecordStore, field: str, value: Any, message: str) -> None:
    mine.put(record(), H100)
    (file,) = mine.folder.glob("*.json")
    content = json.loads(file.read_text())
    content["gpus"][0]["records"][0][field] = value
    file.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=message):
        record_file.read(file)


def test_another_gpus_file_is_not_overwritten(mine: RecordStore) -> None:
    mine.put(record(), H100)
    (file,) = mine.folder.glob("*.json")
    twin = dataclasses.replace(H100, name="NVIDIA H100 80GB (HBM3)")  # the same file name
    with pytest.raises(RecordError, match=r"holds records of NVIDIA H100 80GB HBM3, where those of"):
        mine.put(record(), twin)
    assert len(record_file.read(file)) == 1


def test_export_and_import_move_records(tmp_path: Path, mine: RecordStore) -> None:
    moved = tmp_path / "moved.json"
    with pytest.raises(UsageError, match="there are no records in"):
        mine.export(moved)
    mine.put(record(), H100)
    mine.put(record(bucket="slow", time_us=5.0), H100)
    mine.put(record(), GPUS["l4"])
    assert mine.export(moved) == 3
    other = RecordStore(tmp_path / "other")
    other.put(record(bucket="slow", time_us=4.0), H100)
    other.put(record(time_us=20.0), H100)
    counts = other.import_(moved)
    assert (counts.added, counts.replaced, counts.kept) == (1, 1, 1)
    assert other.records("user")[GpuModel.of(GPUS["l4"])] == mine.records("user")[GpuModel.of(GPUS["l4"])]


def test_export_overwrites_records_only(tmp_path: Path, mine: RecordStore) -> None:
    mine.put(record(), H100)
    precious = tmp_path / "precious.json"
    precious.write_text("{}")
    with pytest.raises(UsageError, match="is no file of tuning records, so it is not overwritten"):
        mine.export(precious)
    assert precious.read_text() == "{}"
    assert [mine.export(tmp_path / "good.json") for _ in range(2)] == [1, 1]


def test_a_damaged_import_takes_nothing_over(tmp_path: Path, mine: RecordStore) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(RecordError, match=r"broken\.json is not JSON"):
        mine.import_(broken)
    assert mine.records("user") == Records()


def test_the_source_hash_minds_text_but_not_line_endings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)

    def hashed(name: str, text: bytes) -> str:
        (tmp_path / f"{name}.py").write_bytes(text)

        class Mine(RmsNorm):
            source: ClassVar[tuple[str, ...]] = (name,)

        return source_hash(Mine())

    first = hashed("tuned_module_a", b"a = 1\nb = 2\n")
    (tmp_path / "tuned_module_a.py").write_bytes(b"a = 1\r\nb = 2\r\n")
    assert hashed("tuned_module_a", b"a = 1\r\nb = 2\r\n") == first
    assert hashed("tuned_module_a", b"a = 1\nb = 3\n") != first
    assert len(first) == 16


def test_where_the_users_records_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("GEMMA3C_RECORDS", raising=False)
    assert default_folder() == Path("/home/ada/.config/gemma3c/records")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/conf")
    assert default_folder() == Path("/conf/gemma3c/records")
    monkeypatch.setenv("GEMMA3C_RECORDS", "/elsewhere")
    assert default_folder() == Path("/elsewhere")
