"""Tunes kernels for a GPU: study after study, a few side by side, and a record for each.

When a study is full its fastest candidates and the heuristic are timed once more, one right after the other, because the
least of a hundred noisy times is not always that of the fastest. The first of that round becomes the record.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from subprocess import SubprocessError, run

from autotune.candidates import Candidates
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Kernel
from autotune.model_shapes import ModelShapes
from autotune.record_file import GpuModel, Timed
from autotune.record_store import Record, RecordStore, source_hash, triton_version
from autotune.storage import Storage
from autotune.study import Compiler, Effort, Problem, Study, Turn, wait_for
from autotune.trial_process import Evaluator
from autotune.trial_worker import Measured
from runtimes.errors import UsageError
from runtimes.progress import SILENT, Progress

FEWEST_FINALISTS, FINALISTS = 2, 4
"""A quarter of what was timed, within these bounds."""
LONGEST_CHUNK = 8192
"""Tokens of a prefill chunk at most, whatever the context."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of one study.

    Args:
        record: None where no candidate worked, or the study ended early with nothing timed.
        heuristic_us: the time of the kernel's default in the same round; None where it failed or was not timed again.
        trials: done by all workers, of how many.
        why: what kept the study from its last trial.
    """

    problem: Problem
    record: Record | None
    heuristic_us: float | None
    trials: tuple[int, int]
    why: str | None

    @property
    def gain(self) -> float | None:
        """How many times faster than the heuristic."""
        if self.record is None or self.heuristic_us is None:
            return None
        return self.heuristic_us / self.record.time_us

    def __str__(self) -> str:
        done, planned = self.trials
        tail = f" ({done} of {planned} trials: {self.why})" if self.why else ""
        if self.record is None:
            return f"{self.problem}: nothing was found{tail}"
        gain = f", {self.gain:.2f}× the heuristic's speed" if self.gain is not None else ""
        time_us, share = self.record.time_us, self.record.roofline
        return f"{self.problem}: {self.record.config}, {time_us:.2f} µs, {share:.0%} of the roofline{gain}{tail}"


def problems(
    kernels: Iterable[Kernel],
    models: Sequence[tuple[ModelShapes, Sequence[int]]],
    gpu: Gpu,
    *,
    batches: Sequence[int],
    dtypes: Sequence[str],
) -> tuple[Problem, ...]:
    """One problem for each bucket that a step of these models meets, about the largest of its cases.

    Args:
        models: each with its contexts: positions before a token of decode, and tokens of a prefill chunk, at most 8192.

    Raises:
        UsageError: there is none.
    """
    found: dict[tuple[str, str, str], Problem] = {}
    for kernel in kernels:
        for case in _cases(kernel, models, batches, dtypes):
            key = (kernel.name, case.dtype, kernel.bucket(case))
            known = found.get(key)
            if known is None or kernel.cost(known.case).floor_s(gpu) < kernel.cost(case).floor_s(gpu):
                found[key] = Problem(kernel=kernel, case=case, gpu=gpu)
    if not found:
        raise UsageError(
            "none of the chosen kernels runs in the chosen models at the chosen dtypes",
            hint="pictures need --size 4b or larger; quantised weights concern matvec and matmul only",
        )
    return tuple(found.values())


def _cases(
    kernel: Kernel, models: Sequence[tuple[ModelShapes, Sequence[int]]], batches: Sequence[int], dtypes: Sequence[str]
) -> Iterator[Case]:
    for stage in kernel.stages:
        for model, contexts in models:
            if stage == "vision" and model.vision is None:
                continue
            for context, batch, dtype in itertools.product(contexts, batches, dtypes):
                tokens = min(context, LONGEST_CHUNK) if stage == "prefill" else context
                for use in kernel.uses(model, stage, batch=batch, context=tokens, dtype=dtype):
                    if use.case.dtype in kernel.dtypes:
                        yield use.case


@dataclass(kw_only=True)
class _Running:
    """A study in hand, with its bar and its signs of life.

    Args:
        budget_s: what it may take, its last round included; None is no limit.
        used_s, landed_s: what it took so far, and how much of that its trials took that are done.
    """

    problem: Problem
    study: Study
    resources: ExitStack
    budget_s: float | None
    used_s: float
    landed_s: float = 0.0

    @property
    def trials(self) -> tuple[int, int]:
        return self.study.finished(), self.study.trials

    @property
    def left_s(self) -> float:
        return max(0.0, (self.budget_s or 0.0) - self.used_s)

    def turn(self) -> Turn:
        """The study's next step."""
        began, ran = time.monotonic(), self.study.ran
        turn = self.study.turn()
        spent_s = time.monotonic() - began
        self.landed_s += spent_s if self.study.ran > ran else 0.0
        self.spend(spent_s)
        return turn

    def spend(self, seconds: float) -> None:
        """Counts time, and has no further trial begin after the first where the last round needs what is left."""
        self.used_s += seconds
        last_round_s = (FINALISTS + 1) * self.landed_s / max(1, self.study.ran)
        if self.budget_s is not None and self.study.ran and self.used_s + last_round_s >= self.budget_s:
            self.study.close()


class Tuner:
    """What all studies of one command share.

    Args:
        store: where records go, and where the configurations to begin with come from.
        effort: the studies that are left share the time that is left until its deadline.
        at_once: studies that go on side by side. One candidate is timed at a time; while it is, those of the other studies
            are compiled, so that the GPU need not wait where a study begins or ends.
        compiler: None leaves compiling to the evaluator.
    """

    def __init__(
        self,
        storage: Storage,
        store: RecordStore,
        evaluator: Evaluator,
        effort: Effort,
        *,
        at_once: int = 1,
        compiler: Compiler | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.storage, self.store, self.evaluator, self.effort = storage, store, evaluator, effort
        self.at_once, self.compiler, self.progress = at_once, compiler, progress

    def tune(self, problems: Sequence[Problem]) -> Iterator[Tuned]:
        """Runs the studies; each is yielded when its record is written.

        Raises:
            HostError: the storage fails, or the process that runs candidates does not start.
            RecordError, OSError: the user's records cannot be read or written.
        """
        waiting = deque(enumerate(problems, start=1))
        running: list[_Running] = []
        thread = ThreadPoolExecutor(1, thread_name_prefix="candidates")  # in the time that others wait for the GPU
        candidates = [thread.submit(Candidates.of, each.kernel, each.case, each.gpu) for each in problems]
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once:
                    budget_s = self._budget_s(len(waiting), running)
                    number, problem = waiting.popleft()
                    try:
                        found = candidates[number - 1].result()
                    except UsageError as error:
                        yield Tuned(problem=problem, record=None, heuristic_us=None, trials=(0, 0), why=error.message)
                        continue
                    label = f"[{number}/{len(problems)}] {problem}"
                    running.append(self._begun(problem, found, budget_s, label))
                for ended in self._turns(running):
                    running.remove(ended)
                    yield self._ended(ended)
        except (KeyboardInterrupt, SystemExit):
            for each in running:
                done, planned = each.trials
                self.progress.note(
                    f"{each.problem}: stopped after {done} of {planned} trials; the same command goes on"
                )
            raise
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
            for each in running:
                each.resources.close()

    def _budget_s(self, waiting: int, running: Sequence[_Running]) -> float | None:
        """Of the next study: what those in hand leave of the time, shared by those that wait."""
        if self.effort.deadline is None:
            return None
        left_s = self.effort.deadline - time.monotonic() - sum(each.left_s for each in running)
        return max(0.0, left_s) / waiting

    def _begun(self, problem: Problem, candidates: Candidates, budget_s: float | None, label: str) -> _Running:
        began, kernel, gpu = time.monotonic(), problem.kernel, problem.gpu
        starts = [self.store.best(kernel, problem.case, gpu).config, kernel.default(problem.case, gpu)]
        with self.storage.watched(), ExitStack() as resources:
            study = Study(
                problem,
                self.storage,
                self.evaluator,
                self.effort,
                starts=starts,
                compiler=self.compiler,
                candidates=candidates,
            )
            advance = resources.enter_context(self.progress.task(label, total=study.trials))
            resources.enter_context(study.attended(advance))
            return _Running(
                problem=problem,
                study=study,
                resources=resources.pop_all(),
                budget_s=budget_s,
                used_s=time.monotonic() - began,
            )

    def _turns(self, running: Sequence[_Running]) -> list[_Running]:
        """One step of each study, or a wait where none can go on; those that are over."""
        with self.storage.watched():
            turns = [each.turn() for each in running]
            if all(turn == "waits" for turn in turns):
                began = time.monotonic()
                wait_for([each.study for each in running])
                for each in running:
                    if each.study.ran:  # before its first trial it waits for processes to start
                        each.spend((time.monotonic() - began) / len(running))
        return [each for each, turn in zip(running, turns, strict=True) if turn == "over"]

    def _ended(self, running: _Running) -> Tuned:
        """The last round of a study that is over, and its record."""
        study = running.study
        with self.storage.watched():
            running.resources.close()
            trials, timed = running.trials, study.timed()
        problem, known = study.problem, self._known(study.problem)
        if study.ran == 0 and known is not None:
            return Tuned(problem=problem, record=known, heuristic_us=None, trials=trials, why=study.ended_early)
        finalists = max(FEWEST_FINALISTS, min(FINALISTS, len(timed) // 4))
        final, heuristic_us = self._final_round(problem, [config for config, _ in timed[:finalists]])
        record = None
        if ranked := final or timed:
            record = _record(problem, ranked)
            self._keep(record, known, problem.gpu)
        return Tuned(problem=problem, record=record, heuristic_us=heuristic_us, trials=trials, why=study.ended_early)

    def _final_round(self, problem: Problem, configs: Sequence[Config]) -> tuple[list[Timed], float | None]:
        """The finalists' times, the fastest first, and the heuristic's, which may be among them."""
        default = problem.kernel.default(problem.case, problem.gpu)
        if not configs:
            return [], None
        times: list[Timed] = []
        for config in [*configs, *([] if default in configs else [default])]:
            outcome = self.evaluator.evaluate(problem.kernel, problem.case, config, lambda repeats, us: True)
            if isinstance(outcome, Measured):
                times.append((config, outcome.time_us))
        heuristic_us = next((time_us for config, time_us in times if config == default), None)
        return sorted(times, key=lambda timed: timed[1]), heuristic_us

    def _known(self, problem: Problem) -> Record | None:
        """The user's record with the same key."""
        mine = self.store.records("user").get(GpuModel.of(problem.gpu), {})
        environment = (source_hash(problem.kernel), triton_version())
        return mine.get((problem.kernel.name, *environment, problem.case.dtype, problem.bucket))

    def _keep(self, record: Record, known: Record | None, gpu: Gpu) -> None:
        """A record of another case says nothing of this one's time, whichever is less."""
        self.store.put(record, gpu, only_if_faster=known is not None and known.case == record.case)


def _record(problem: Problem, ranked: Sequence[Timed]) -> Record:
    config, time_us = ranked[0]
    return Record(
        kernel=problem.kernel.name,
        source_hash=source_hash(problem.kernel),
        triton=triton_version(),
        dtype=problem.case.dtype,
        bucket=problem.bucket,
        config=config,
        time_us=time_us,
        runner_up=ranked[1] if len(ranked) > 1 else None,
        roofline=problem.kernel.cost(problem.case).floor_s(problem.gpu) * 1e6 / time_us,
        case=problem.case,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        driver=driver_version(),
    )


def driver_version() -> str:
    """NVIDIA's version of this host, or ``unknown``."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, SubprocessError):
        return "unknown"
    return lines[0] if lines else "unknown"
