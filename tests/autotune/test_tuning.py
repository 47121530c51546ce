"""From models to problems, from studies to records."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
from optuna.storages import InMemoryStorage

from autotune.ahead_of_time import Compiled
from autotune.kernel import Case, Config, Kernel
from autotune.launch import Launch
from autotune.record_file import GpuModel, Record, read
from autotune.record_store import RecordStore, source_hash, triton_version
from autotune.sampler import Kind
from autotune.storage import Secrets, Storage
from autotune.study import Effort, Problem
from autotune.trial_process import Evaluator
from autotune.trial_worker import Failed, GoOn, Measured, Outcome
from autotune.tuning import FINALISTS, Tuner, problems
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from runtimes.errors import UsageError
from runtimes.progress import Progress
from tests.autotune.test_study import cubin
from tests.autotune.tiny import H100, Double, Hopeless, InProcess, problem, true_us

BEST = Config(constants={"BLOCK": 32, "WRONG": 0}, num_warps=4, num_stages=2)


class Notes(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


class Noisy(InProcess):
    """The first time of every candidate is wrong by what ``noise`` says; later ones are right."""

    def __init__(self, noise: dict[int, float]) -> None:
        super().__init__()
        self.noise = noise

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        seen = config in self.seen
        outcome = super().evaluate(kernel, case, config, go_on)
        if isinstance(outcome, Measured) and not seen:
            return Measured(time_us=outcome.time_us + self.noise.get(config.constants["BLOCK"], 0.0))
        return outcome


class Stops(InProcess):
    """An interrupt comes with the third candidate."""

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        if len(self.seen) == 3:
            raise KeyboardInterrupt
        return super().evaluate(kernel, case, config, go_on)


def tuner(
    folder: Path,
    evaluator: Evaluator | None = None,
    *,
    storage: Storage | None = None,
    trials: int | None = None,
    sampler: Kind = "grid",
    deadline: float | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> Tuner:
    storage = storage or memory()
    effort = Effort(sampler=sampler, trials=trials, seed=0, deadline=deadline, ahead=2)
    evaluator = evaluator or InProcess()
    return Tuner(storage, RecordStore(folder), evaluator, effort, progress=progress or Progress(), **more)


def sizes(*values: int) -> list[Problem]:
    """A study for each."""
    return [problem(case=Case(dtype="float32", dims={"size": size})) for size in values]


def memory() -> Storage:
    return Storage(optuna=InMemoryStorage(), place="memory", secrets=Secrets(()), beats=False)


def records_in(folder: Path) -> list[Record]:
    return [record for file in folder.glob("*.json") for records in read(file).values() for record in records.values()]


def test_a_study_leaves_a_record(tmp_path: Path) -> None:
    [tuned] = tuner(tmp_path).tune([problem()])
    assert tuned.record is not None
    assert records_in(tmp_path) == [tuned.record]
    assert (tuned.record.config, tuned.record.time_us) == (BEST, 10.0)
    assert tuned.record.runner_up is not None and tuned.record.runner_up[1] == 10.5
    assert tuned.record.roofline == pytest.approx(8 * 40 / 3.35e12 * 1e6 / 10)
    assert tuned.record.key == ("double", source_hash(Double()), triton_version(), "float32", "size<=64")
    assert tuned.heuristic_us == 20.5
    assert tuned.gain == 2.05
    assert tuned.trials == (34, 34)
    assert (
        str(tuned)
        == "double size<=64: BLOCK=32 WRONG=0 warps=4 stages=2, 10.00 µs, 0% of the roofline, 2.05× the heuristic's speed"
    )
    assert RecordStore(tmp_path).best(Double(), problem().case, H100).config == BEST


def test_the_last_round_decides_between_the_fastest(tmp_path: Path) -> None:
    evaluator = Noisy({32: 1.5, 64: -4.0})  # so that a block of 64 seems the fastest
    [tuned] = tuner(tmp_path, evaluator).tune([problem()])
    assert tuned.record is not None
    assert tuned.record.config.constants["BLOCK"] == 64
    assert tuned.record.time_us == true_us(tuned.record.config), "the record holds the last round's time"
    last = evaluator.seen[34:]
    assert len(last) == FINALISTS + 1 and last[-1] == Double().default(problem().case, H100)


def test_a_full_study_whose_record_stands_is_not_timed_again(tmp_path: Path) -> None:
    storage, evaluator = memory(), InProcess()
    [first] = tuner(tmp_path, evaluator, storage=storage).tune([problem()])
    [again] = tuner(tmp_path, evaluator, storage=storage).tune([problem()])
    assert again.record == first.record
    assert len(evaluator.seen) == 34 + FINALISTS + 1
    [elsewhere] = tuner(tmp_path / "other", evaluator, storage=storage).tune([problem()])
    assert elsewhere.record is not None and elsewhere.record.config == BEST, (
        "a worker that came late gets its record too"
    )
    assert len(evaluator.seen) == 34 + 2 * (FINALISTS + 1)


def test_a_faster_record_of_the_same_case_stays(tmp_path: Path) -> None:
    [tuned] = tuner(tmp_path).tune([problem()])
    assert tuned.record is not None
    store = RecordStore(tmp_path)
    fields = {name: getattr(tuned.record, name) for name in Record.__dataclass_fields__}
    faster = Record(**fields | {"time_us": 1.0})
    store.put(faster, H100)
    list(tuner(tmp_path).tune([problem()]))
    assert records_in(tmp_path) == [faster]
    other_case = Record(**fields | {"time_us": 1.0, "case": Case(dtype="float32", dims={"size": 33})})
    store.put(other_case, H100)
    list(tuner(tmp_path).tune([problem()]))
    assert [record.time_us for record in records_in(tmp_path)] == [10.0], "a smaller case says nothing of this one"


def test_a_study_begins_with_the_record(tmp_path: Path) -> None:
    list(tuner(tmp_path).tune([problem()]))
    evaluator = InProcess()
    list(tuner(tmp_path, evaluator, trials=3, sampler="random").tune([problem()]))
    assert evaluator.seen[:2] == [BEST, Double().default(problem().case, H100)]


def test_where_nothing_works_no_record_is_written(tmp_path: Path) -> None:
    [tuned] = tuner(tmp_path).tune([problem(Hopeless())])
    assert tuned.record is None
    assert records_in(tmp_path) == []
    assert str(tuned).startswith("hopeless size<=64: nothing was found (8 of 34 trials: its first 8 candidates failed")


def test_an_interrupt_is_noted_and_leaves_no_record(tmp_path: Path) -> None:
    storage, notes = memory(), Notes()
    with pytest.raises(KeyboardInterrupt):
        list(tuner(tmp_path, Stops(), storage=storage, progress=notes).tune([problem()]))
    assert notes.said == ["double size<=64: stopped after 3 of 34 trials; the same command goes on"]
    assert not list(tmp_path.iterdir())
    [tuned] = tuner(tmp_path, storage=storage).tune([problem()])
    assert tuned.record is not None and tuned.record.config == BEST
    assert tuned.trials == (34, 34)


@pytest.mark.parametrize("at_once", [1, 2])
def test_studies_share_the_time(tmp_path: Path, at_once: int) -> None:
    began = time.monotonic()
    cases = sizes(10, 20, 40, 70, 150)
    results = list(tuner(tmp_path, InProcess(delay_s=0.05), deadline=began + 5, at_once=at_once).tune(cases))
    assert [tuned.why for tuned in results] == ["its time was up"] * 5
    assert all(tuned.trials[0] >= 1 and tuned.record is not None for tuned in results)
    assert "trials: its time was up)" in str(results[0])
    counts = [tuned.trials[0] for tuned in results]
    assert max(counts) < 3 * min(counts), counts


def test_studies_side_by_side_find_what_they_would_alone(tmp_path: Path) -> None:
    evaluator = InProcess()
    cases = sizes(10, 20, 40)
    results = list(tuner(tmp_path, evaluator, at_once=2).tune(cases))
    assert [tuned.problem.case for tuned in results] == [each.case for each in cases]
    assert all(tuned.record is not None and tuned.record.config == BEST for tuned in results)
    assert all(tuned.trials == (34, 34) for tuned in results)
    assert len(evaluator.seen) == 3 * (34 + FINALISTS + 1)
    assert len(records_in(tmp_path)) == 3


class Compiler:
    """Compiles when it is told to; notes what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Future[Compiled]]] = []

    def submit(self, launch: Launch, architecture: int) -> Future[Compiled]:
        self.asked.append((cast(int, launch.arguments["size"]), Future()))
        return self.asked[-1][1]


def test_the_next_study_compiles_while_the_first_one_is_timed(tmp_path: Path) -> None:
    compiler = Compiler()
    in_hand: list[set[int]] = []

    class Watching(InProcess):
        def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
            in_hand.append({size for size, future in compiler.asked if not future.done()})
            return super().evaluate(kernel, case, config, go_on)

    def finish_one(seconds: float) -> None:
        """In the place of a wait: the oldest compilation is done."""
        next(future for _, future in compiler.asked if not future.done()).set_result(cubin(0))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("autotune.tuning.wait_for", finish_one)
        results = list(tuner(tmp_path, Watching(), trials=4, at_once=2, compiler=compiler).tune(sizes(10, 40)))
    assert [tuned.trials for tuned in results] == [(4, 4)] * 2
    assert {10, 40} in in_hand, "both studies have compilations in hand while a candidate is timed"


def test_an_interrupt_is_noted_for_each_study(tmp_path: Path) -> None:
    storage, notes = memory(), Notes()
    with pytest.raises(KeyboardInterrupt):
        list(tuner(tmp_path, Stops(), storage=storage, progress=notes, at_once=2).tune(sizes(10, 40)))
    assert [note.partition(":")[0] for note in notes.said] == ["double size<=16", "double size<=64"]
    assert sum(int(note.partition("after ")[2].partition(" ")[0]) for note in notes.said) == 3
    results = list(tuner(tmp_path, storage=storage, at_once=2).tune(sizes(10, 40)))
    assert [tuned.trials for tuned in results] == [(34, 34)] * 2


def test_a_finalist_that_fails_is_no_record(tmp_path: Path) -> None:
    class Flaky(InProcess):
        def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
            if config in self.seen and config == BEST:
                return Failed(reason="a wrong result at the second look")
            return super().evaluate(kernel, case, config, go_on)

    [tuned] = tuner(tmp_path, Flaky()).tune([problem()])
    assert tuned.record is not None and tuned.record.time_us == 10.5


def shapes(size: str, contexts: tuple[int, ...] = (1024,)) -> tuple[object, tuple[int, ...]]:
    return model_shapes(preset(size)), contexts


def test_one_problem_for_each_bucket_about_its_largest_case() -> None:
    found = problems(
        [Double()], [shapes("270m"), shapes("1b"), shapes("4b")], H100, batches=[1, 3], dtypes=["bfloat16"]
    )  # type: ignore[list-item]
    assert {p.bucket: p.case.dims["size"] for p in found} == {
        "size<=1024": 640,
        "size<=2048": 1920,
        "size<=4096": 3456,
        "size<=8192": 7680,
    }


def test_no_problem_is_wrong_usage() -> None:
    from autotune.registry import KERNELS

    with pytest.raises(UsageError, match="none of the chosen kernels runs in the chosen models"):
        problems([KERNELS["siglip_attention"]], [shapes("270m")], H100, batches=[1], dtypes=["bfloat16"])  # type: ignore[list-item]


def test_chunks_are_no_longer_than_8192() -> None:
    from autotune.registry import KERNELS

    found = problems([KERNELS["matmul"]], [shapes("270m", (1024, 32768))], H100, batches=[1], dtypes=["bfloat16"])  # type: ignore[list-item]
    assert {problem.case.dims["rows"] for problem in found} == {1024, 8192}


def test_the_records_file_is_the_gpus(tmp_path: Path) -> None:
    list(tuner(tmp_path).tune([problem()]))
    [file] = tmp_path.glob("*.json")
    assert list(read(file)) == [GpuModel.of(H100)]
