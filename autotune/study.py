"""One study: the search for the fastest candidate of a kernel on a GPU, for a dtype and a bucket of shapes.

A study lives in a storage, so that several workers can join it and a killed one can be resumed. Its name holds all
that makes times comparable: kernel, GPU model, bucket, the sources' hash and Triton's version. The trials' states:

- complete: right, and timed;
- pruned: does not fit the GPU, does not compile, or was slower than half of those before after a few replays;
- failed, with the attribute ``reason``: computed something else, crashed or hung;
- failed, with the attribute ``set_aside``: no trial of the study's, the candidate is free again or was another's.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import MedianPruner
from optuna.trial import FrozenTrial, TrialState

from autotune.ahead_of_time import Compiled, CompileError
from autotune.attendance import Attendance
from autotune.candidates import Candidates, params_of
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Kernel, Space
from autotune.launch import Launch
from autotune.record_store import source_hash, triton_version
from autotune.sampler import REASON, SET_ASIDE, CandidateSampler, Kind, counts, taken
from autotune.storage import GRACE_S, HEARTBEAT_S, Storage
from autotune.trial_process import Evaluator
from autotune.trial_worker import Failed, Measured, Stopped, Unfit

FEWEST, MOST = 30, 120
"""Bounds of the default number of trials, which is a quarter of the candidates."""
TIMED_BEFORE_PRUNING = 5
FAILURES = 8
"""So many failures and nothing timed end a study: the next candidate will fail too."""
_POLL_S = 0.5
_DRAWING_S = 5.0
"""How long another worker may take to write down the candidate that it drew."""
_CASE = "case"
Turn = Literal["goes on", "waits", "over"]


class Compiler(Protocol):
    """What compiles ahead, so that the process with the GPU finds the result in Triton's cache."""

    def submit(self, launch: Launch, architecture: int) -> Future[Compiled]: ...


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a study is about. Cases of one bucket share a study: the first that came is measured."""

    kernel: Kernel
    case: Case
    gpu: Gpu

    @property
    def bucket(self) -> str:
        return self.kernel.bucket(self.case)

    @property
    def name(self) -> str:
        """The study's name in its storage."""
        sources = f"sources {source_hash(self.kernel)}, triton {triton_version()}"
        return f"{self.kernel.name}, {self.gpu.name}, {self.case.dtype}, {self.bucket}, {sources}"

    def __str__(self) -> str:
        return f"{self.kernel.name} {self.bucket}"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How a study is run.

    Args:
        trials: of all workers together; None takes a quarter of the candidates, a grid all of them.
        deadline: of ``time.monotonic()``, after which no trial begins.
        ahead: trials that are compiled while one is timed.
        seed: of the sampler; None draws one.
        interval_s, grace_s: of the signs of life, as :class:`Attendance` has them.
    """

    sampler: Kind = "tpe"
    trials: int | None = None
    deadline: float | None = None
    ahead: int = 1
    seed: int | None = None
    interval_s: float = HEARTBEAT_S
    grace_s: float = GRACE_S

    def trials_of(self, candidates: Candidates) -> int:
        """How many trials there will be; never more than candidates."""
        every = len(candidates.fitting)
        if self.trials is not None:
            return min(self.trials, every)
        return every if self.sampler == "grid" else min(every, max(FEWEST, min(MOST, every // 4)))

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(kw_only=True)
class _Flight:
    """A trial that this worker runs; ``compiled`` are the compilations of its launches."""

    trial: optuna.Trial
    config: Config
    compiled: Sequence[Future[Compiled]] = field(default_factory=tuple)


class Study:
    """A study that this worker has joined.

    Args:
        starts: configurations to begin with: what is recorded, and the heuristic.
        compiler: None leaves compiling to the evaluator.
        space: a part of the kernel's space; None takes all of it.
        candidates: those of the problem's case, if they are known already.

    Raises:
        UsageError: no candidate fits the GPU.
    """

    def __init__(
        self,
        problem: Problem,
        storage: Storage,
        evaluator: Evaluator,
        effort: Effort,
        *,
        starts: Sequence[Config] = (),
        compiler: Compiler | None = None,
        space: Space | None = None,
        candidates: Candidates | None = None,
    ) -> None:
        self._storage, self._evaluator, self._effort, self._compiler = storage, evaluator, effort, compiler
        self.study = optuna.create_study(
            storage=storage.optuna,
            study_name=problem.name,
            load_if_exists=True,
            pruner=MedianPruner(n_startup_trials=TIMED_BEFORE_PRUNING),
        )
        self.problem = replace(problem, case=self._agreed_case(problem.case))
        if candidates is None or self.problem.case != problem.case:
            candidates = Candidates.of(self.problem.kernel, self.problem.case, problem.gpu, space)
        self.candidates = candidates
        self.study.sampler = CandidateSampler(self.candidates, effort.sampler, effort.seed)
        self.trials = effort.trials_of(self.candidates)
        self.ran = 0
        """Trials that this worker finished."""
        self.ended_early: str | None = None
        """Why the study ended before its last trial, if it did."""
        self._flights: deque[_Flight] = deque()
        self._hopeless: str | None = None
        self._advance: Callable[[int], None] = lambda done: None
        self._told = 0
        self._closing = False
        self._start_with(starts)

    def counted(self) -> list[FrozenTrial]:
        """The study's trials, of all workers, those that are running included."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if counts(trial)]

    def finished(self) -> int:
        """How many trials are done."""
        return sum(trial.state.is_finished() for trial in self.counted())

    def timed(self) -> list[tuple[Config, float]]:
        """Candidates and their times in microseconds, the fastest first."""
        complete = [trial for trial in self.counted() if trial.state == TrialState.COMPLETE]
        pairs = [(self.candidates.config(trial.params), float(trial.value or 0.0)) for trial in complete]
        return sorted(pairs, key=lambda pair: pair[1])

    def run(self, advance: Callable[[int], None] = lambda done: None) -> None:
        """Runs trials until the study is full, the time is up, or no candidate works.

        Args:
            advance: hears how many more trials are done, those of other workers included.

        An interrupt or an error gives the trials in hand back to the study.
        """
        with self.attended(advance):
            while (turn := self.turn()) != "over":
                if turn == "waits":
                    wait_for([self])

    @contextmanager
    def attended(self, advance: Callable[[int], None] = lambda done: None) -> Iterator[None]:
        """This worker's part in the study, within which :meth:`turn` may be called."""
        times = self._effort
        self._advance, self._told = advance, 0
        with Attendance(
            self._storage.optuna, heartbeat=self._storage.beats, interval_s=times.interval_s, grace_s=times.grace_s
        ) as self._attendance:
            try:
                yield
            finally:
                for flight in self._flights:
                    self._give_back(flight.trial)

    def close(self) -> None:
        """Has no further trial begin: its time is up."""
        self._closing = True

    @property
    def _late(self) -> bool:
        return self._closing or self._effort.late

    def turn(self) -> Turn:
        """One step: begins a trial, or finishes one that is compiled."""
        self._attendance.reclaim(self.study)
        trials = self.study.get_trials(deepcopy=False)
        done = sum(trial.state.is_finished() for trial in trials if counts(trial))
        self._advance(done - self._told)
        self._told = done
        if self._must_end(trials):
            return "over"
        if len(self._flights) < self._effort.ahead and not self._late and self._has_room(trials):
            self._take_off()
            return "goes on"
        if self._flights:
            return "goes on" if self._land() else "waits"
        return "waits" if done < sum(map(counts, trials)) else "over"

    @property
    def awaited(self) -> list[Future[Compiled]]:
        """Compilations that trials in hand wait for. None where other workers' trials are what is left."""
        return [compiled for flight in self._flights for compiled in flight.compiled if not compiled.done()]

    def _must_end(self, trials: Sequence[FrozenTrial]) -> bool:
        failed = [trial for trial in trials if trial.state == TrialState.FAIL and counts(trial)]
        if len(failed) >= FAILURES and not any(trial.state == TrialState.COMPLETE for trial in trials):
            self._hopeless = f"its first {len(failed)} candidates failed, the last: {failed[-1].user_attrs[REASON]}"
        if self._hopeless is not None:
            self.ended_early = self._hopeless
        elif self._late and not self._flights and sum(map(counts, trials)) < self.trials:
            self.ended_early = "its time was up"
        return self.ended_early is not None

    def _has_room(self, trials: Sequence[FrozenTrial]) -> bool:
        waits = any(trial.state == TrialState.WAITING for trial in trials)
        free = len(taken(self.candidates, trials)) < len(self.candidates.fitting)
        return sum(map(counts, trials)) < self.trials and (waits or free)

    def _take_off(self) -> None:
        """Begins a trial: its compilation, where a compiler works ahead."""
        trial = self._ask()
        reason = self._redundant(trial)
        if reason is not None:
            self._set_aside(trial, reason)
            return
        flight = _Flight(trial=trial, config=self.candidates.config(trial.params))
        self._flights.append(flight)
        if self.candidates.key(trial.params) is not None and self._compiler is not None:
            architecture = self.problem.gpu.architecture
            flight.compiled = [self._compiler.submit(launch, architecture) for launch in self._launches(flight.config)]

    def _ask(self) -> optuna.Trial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that heartbeats are for Study.optimize: ours are given by Attendance
            trial = self.study.ask(dict(self.candidates.distributions))
        self._attendance.enter(trial)
        return trial

    def _redundant(self, mine: optuna.Trial) -> str | None:
        """Workers that ask at the same moment may get one candidate, or more trials than there should be."""
        limit = time.monotonic() + _DRAWING_S
        while True:
            before = [t for t in self.counted() if t.number < mine.number or t.state.is_finished()]
            drawing = any(not t.state.is_finished() and t.params.keys() != mine.params.keys() for t in before)
            if not drawing or time.monotonic() > limit:  # parameters are written one by one
                break
            time.sleep(_POLL_S / 50)
        twin = next((t for t in before if t.params == mine.params), None)
        if twin is not None:
            return f"the candidate of trial {twin.number}"
        return "the study was full" if len(before) >= self.trials else None

    def _launches(self, config: Config) -> Sequence[Launch]:
        kernel, case = self.problem.kernel, self.problem.case
        tensors = kernel.inputs(case, device="meta") | kernel.outputs(case, config, device="meta")
        return kernel.launches(case, config, tensors)

    def _land(self) -> bool:
        """Finishes the first trial that is compiled, if one is."""
        flight = next((f for f in self._flights if all(c.done() for c in f.compiled)), None)
        if flight is None:
            return False
        try:
            self._finish(flight)
            self.ran += 1
        except UpdateFinishedTrialError:
            pass  # another worker took this one for dead, and its candidate over
        self._flights.remove(flight)
        self._attendance.leave(flight.trial)
        return True

    def _finish(self, flight: _Flight) -> None:
        """Times a trial, unless it is known not to fit, and tells the study."""
        trial, gpu = flight.trial, self.problem.gpu
        reason = self._refusal(flight)
        if reason is not None:
            self._tell(trial, TrialState.PRUNED, reason)
            return

        def go_on(repeats: int, median_us: float) -> bool:
            trial.report(median_us, repeats)
            return not trial.should_prune()

        outcome = self._evaluator.evaluate(self.problem.kernel, self.problem.case, flight.config, go_on)
        match outcome:
            case Measured():
                self.study.tell(trial, outcome.time_us, skip_if_finished=True)
            case Stopped():
                self._tell(trial, TrialState.PRUNED, "slower than half of those before")
            case Unfit():
                self._tell(trial, TrialState.PRUNED, f"does not run on {gpu.name}: {outcome.reason}")
            case Failed():
                self._tell(trial, TrialState.FAIL, outcome.reason)
                if outcome.hopeless:
                    self._hopeless = outcome.reason

    def _refusal(self, flight: _Flight) -> str | None:
        kernel, gpu = self.problem.kernel, self.problem.gpu
        if self.candidates.key(flight.trial.params) is None:
            return kernel.refusal(self.problem.case, flight.config, gpu) or "it is none of the candidates"
        try:
            compiled = [future.result() for future in flight.compiled]
        except CompileError as error:
            return error.message
        for each in compiled:
            if each.shared_bytes > gpu.shared_bytes:
                return f"{each.shared_bytes} bytes of shared memory do not fit the {gpu.shared_bytes} of {gpu.name}"
        return None

    def _tell(self, trial: optuna.Trial, state: TrialState, reason: str) -> None:
        trial.set_user_attr(REASON, reason)
        self.study.tell(trial, state=state, skip_if_finished=True)

    def _set_aside(self, trial: optuna.Trial, why: str) -> None:
        trial.set_user_attr(SET_ASIDE, why)
        self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        self._attendance.leave(trial)

    def _give_back(self, trial: optuna.Trial) -> None:
        """Lets the candidate of a trial in hand wait for who resumes the study. Where the storage is gone it stays."""
        try:
            self._set_aside(trial, "its worker was interrupted")
            self.study.enqueue_trial(trial.params)
        except Exception:  # noqa: BLE001 - what ended the run is what its reader must hear of
            return

    def _agreed_case(self, case: Case) -> Case:
        """The case that the study's first worker began with."""
        if _CASE not in self.study.user_attrs:
            self.study.set_user_attr(_CASE, {"dtype": case.dtype, "dims": dict(case.dims)})
        stored = self.study.user_attrs[_CASE]
        return Case(dtype=stored["dtype"], dims=stored["dims"])

    def _start_with(self, starts: Sequence[Config]) -> None:
        """Lets the candidates wait that ``starts`` are; the nearest ones, where a heuristic is none of the space."""
        tried = taken(self.candidates, self.study.get_trials(deepcopy=False))
        for params in map(params_of, starts):
            if params.keys() != self.candidates.values.keys():
                continue  # a record of older sources
            key = self.candidates.key(params) or self.candidates.nearest(params, self.candidates.fitting)[0]
            if key not in tried:
                tried.add(key)
                self.study.enqueue_trial(self.candidates.params(key))


def wait_for(studies: Sequence[Study]) -> None:
    """Returns when a study that waits may go on: when a compilation is done, or after half a second."""
    awaited = [compiled for study in studies for compiled in study.awaited]
    if awaited:
        wait(awaited, timeout=_POLL_S, return_when=FIRST_COMPLETED)
    else:
        time.sleep(_POLL_S)  # the rest runs elsewhere, and comes here if its worker dies
