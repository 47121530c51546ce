"""The kernels of a bundle: which there are, how their configurations are chosen, and that equal builds are equal bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from autotune import record_file
from autotune.ahead_of_time import Compiled, Parameter, request_of
from autotune.gpu import GPUS
from autotune.kernel import Case, Config
from autotune.kernels.window_decode import WindowDecode
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.record_file import Record
from autotune.record_store import RecordStore, source_hash, triton_version
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from graphs.trt import kernels
from graphs.trt.kernels import RECORDS_NAME, KernelsFacts, gpu_of, needs_of, write_kernels
from runtimes.errors import UsageError
from runtimes.gpu.kernel_file import KernelFile, hash_of
from runtimes.gpu.kernel_store import KernelStore

NANO, SMALL, LARGE = (model_shapes(preset(size)) for size in ("nano", "270m", "12b"))
SCHEMA = json.loads(resources.files("runtimes").joinpath("schema/kernels.schema.json").read_text())


class FakePool:
    """Compiles nothing: a cubin is the text of what was asked for."""

    def __init__(self, **options: Any) -> None:
        assert os.environ["TRITON_DISABLE_LINE_INFO"] == "1"

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, launch: Launch, architecture: int, *, varying: frozenset[str] = frozenset()) -> Future[Compiled]:
        request = request_of(launch, architecture, varying=varying)
        kept = {name: facts for name, facts in request.arguments.items() if not facts.one or facts.varies}
        future: Future[Compiled] = Future()
        future.set_result(
            Compiled(
                architecture=architecture,
                cubin=repr(request).encode(),
                name=request.function,
                parameters=tuple(Parameter(name=name, type=facts.type) for name, facts in kept.items()),
                aligned=(),
                shared_bytes=0,
                registers=32,
                spill_bytes=0,
                num_warps=launch.num_warps,
                num_ctas=1,
                global_scratch_bytes=0,
                global_scratch_align=1,
                profile_scratch_bytes=0,
            )
        )
        return future


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CompilerPool", FakePool)


@pytest.fixture
def records(tmp_path: Path) -> RecordStore:
    (tmp_path / "shipped").mkdir()
    return RecordStore(tmp_path / "user", shipped_folder=tmp_path / "shipped")


def written(
    folder: Path, model: ModelShapes, architectures: list[int], records: RecordStore, *, chunk: int = 512
) -> tuple[KernelsFacts, KernelFile]:
    facts = write_kernels(folder, model, architectures, max_batch=4, chunk=chunk, records=records)
    text = (folder / facts.file).read_bytes()
    assert hash_of(text) == facts.hash
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(text))
    return facts, KernelFile.loads(text)


@pytest.mark.usefixtures("fake")
def test_which_kernels_a_model_needs(tmp_path: Path, records: RecordStore) -> None:
    _, text = written(tmp_path, SMALL, [80], records)
    assert set(text.kernels) == {"window_prefill", "cache_write", "window_decode"}
    _, pictures = written(tmp_path, NANO, [80], records)
    assert set(pictures.kernels) == {*text.kernels, "siglip_pool"}
    for file, read in ((text, False), (pictures, True)):
        tensors = {tensor.name for tensor in file.kernel("window_prefill").variants[0].tensors}
        assert ("visible_end" in tensors) is read


@pytest.mark.usefixtures("fake")
def test_every_architecture_has_every_size(tmp_path: Path, records: RecordStore) -> None:
    _, file = written(tmp_path, LARGE, [120, 80, 90], records, chunk=2048)
    assert file.architectures == (80, 90, 120)
    for architecture in file.architectures:
        for name, facts in file.kernels.items():
            for batch in (1, 2, 3, 4):
                for chunk in (1, 2, 1024, 1025, 2048):
                    values = {"B": batch, "S": chunk, "N": batch, "scale": 1.0, "eps": 1e-6}
                    variant = facts.variant(architecture, values)
                    assert variant is not None, (name, architecture, values)
                    assert variant.workspace(values)[2] <= variant.workspace({**values, **facts.largest})[2]


@pytest.mark.usefixtures("fake")
def test_files_are_what_the_facts_say(tmp_path: Path, records: RecordStore) -> None:
    facts, file = written(tmp_path, NANO, [86, 86], records)
    found = sorted(path.name for path in (tmp_path / "cubins").iterdir())
    assert found == [f"{digest}.cubin" for digest in file.cubins]
    assert facts.cubins == len(found)
    assert facts.cubin_bytes == sum(path.stat().st_size for path in (tmp_path / "cubins").iterdir())
    assert facts.tuning_records == () and not (tmp_path / RECORDS_NAME).exists()
    assert "no tuning record for NVIDIA A10" in facts.warnings[0]
    assert "TRITON_DISABLE_LINE_INFO" not in os.environ
    assert KernelStore.open(tmp_path).hash == facts.hash


def decode_record(batch: int, splits: int) -> Record:
    kernel = WindowDecode()
    need = next(need for need in needs_of(LARGE, max_batch=4, chunk=512) if need.kernel.name == kernel.name)
    case = Case(dtype="bfloat16", dims=dict(need.steps[0][1].dims) | {"batch": batch})
    return Record(
        kernel=kernel.name,
        source_hash=source_hash(kernel),
        triton=triton_version(),
        dtype="bfloat16",
        bucket=kernel.bucket(case),
        config=Config(constants={**kernel.default(case, GPUS["rtx4090"]).constants, "SPLITS": splits}, num_warps=4, num_stages=2),
        time_us=9.0,
        runner_up=None,
        roofline=0.5,
        case=case,
        when="2026-01-01T00:00:00Z",
        driver="580",
    )  # fmt: skip


@pytest.mark.usefixtures("fake")
def test_records_are_taken_and_kept(tmp_path: Path, records: RecordStore) -> None:
    """Of two batches that have records each has its own variant; a third is the heuristic's."""
    for batch, splits in ((1, 32), (2, 16)):
        records.put(decode_record(batch, splits), GPUS["rtx4090"])
    facts, file = written(tmp_path, LARGE, [89], records)
    one, two, four = file.kernel("window_decode").variants
    assert (one.when, two.when, four.when) == (("B <= 1",), ("B <= 2",), ())
    assert (one.launches[0].grid[0], two.launches[0].grid[0]) == ("32", "16")
    assert (one.tuning.origin, four.tuning.origin) == ("user", "heuristic")
    assert one.tuning.gpu == "NVIDIA GeForce RTX 4090"
    assert one.tuning.record is not None and one.tuning.record["bucket"] == decode_record(1, 32).bucket
    assert one.tuning.record["gpu"] == "NVIDIA GeForce RTX 4090" and four.tuning.record is None
    assert facts.tuning_records == (RECORDS_NAME,)
    (kept,) = record_file.read(tmp_path / RECORDS_NAME).values()
    assert {record.bucket for record in kept.values()} == {decode_record(1, 1).bucket, decode_record(2, 1).bucket}


@pytest.mark.usefixtures("fake")
def test_neighbours_with_one_configuration_are_one_variant(tmp_path: Path, records: RecordStore) -> None:
    for batch in (1, 2, 4):
        records.put(decode_record(batch, 8), GPUS["l4"])
    _, file = written(tmp_path, LARGE, [89], records)
    (only,) = file.kernel("window_decode").variants
    assert only.when == ()


def test_a_gpu_for_each_architecture(records: RecordStore) -> None:
    for architecture, name in ((80, "A100"), (87, "A10"), (89, "L4"), (90, "H100"), (103, "B200"), (121, "5090")):
        gpu = gpu_of(architecture, records)
        assert name in gpu.name and gpu.architecture == architecture
    records.put(decode_record(1, 8), replace(GPUS["l4"], name="NVIDIA L40", multiprocessors=142))
    tuned = gpu_of(89, records)
    assert (tuned.name, tuned.multiprocessors, tuned.architecture) == ("NVIDIA L40", 142, 89)


@pytest.mark.parametrize(
    ("architecture", "words"), [(75, "sm_75 has no bf16 products"), (130, "known to run on sm_130")]
)
def test_architectures_that_do_not_do(records: RecordStore, architecture: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        gpu_of(architecture, records)


def test_equal_builds_are_equal_bytes(tmp_path: Path) -> None:
    """In processes and caches of their own; and nothing of this host stands in them."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom autotune.record_store import RecordStore\n"
        "from gemma3_compile.model_shapes import model_shapes\nfrom gemma3_compile.presets import preset\n"
        "from graphs.trt.kernels import write_kernels\nout = Path(sys.argv[1])\n(out / 'none').mkdir(parents=True)\n"
        "store = RecordStore(out / 'none', shipped_folder=out / 'none')\n"
        "write_kernels(out, model_shapes(preset('nano')), [80], max_batch=2, chunk=64, records=store, workers=2)\n"
    )
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}
        subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True)
    one, two = (_contents(folder) for folder in folders)
    assert one == two and len(one) == 5
    assert all(data[:4] == b"\x7fELF" for name, data in one.items() if name.endswith(".cubin"))
    assert not any(str(Path(__file__).parents[3]).encode() in data for data in one.values())


def _contents(folder: Path) -> dict[str, bytes]:
    paths = [folder / "kernels.json", *(folder / "cubins").iterdir()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
