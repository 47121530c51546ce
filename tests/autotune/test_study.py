"""One study: what it tries, what becomes of each trial, and that it can be left and joined at any time."""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from autotune import study as studies
from autotune.ahead_of_time import Compiled, CompileError
from autotune.attendance import WORKER
from autotune.candidates import Candidates, config_of, params_of
from autotune.kernel import Case, Config, Kernel
from autotune.launch import Launch
from autotune.sampler import REASON, SET_ASIDE, Kind, counts
from autotune.storage import Secrets, Storage, open_storage
from autotune.study import FAILURES, FEWEST, MOST, TIMED_BEFORE_PRUNING, Effort, Study
from autotune.trial_worker import Failed, GoOn, Measured, Outcome, Unfit
from tests.autotune.tiny import CASE, H100, Double, Faulty, Hopeless, InProcess, problem, true_us

ALL = Candidates.of(Double(), CASE, H100)
BEST = Config(constants={"BLOCK": 32, "WRONG": 0}, num_warps=4, num_stages=2)


def memory() -> Storage:
    return Storage(optuna=InMemoryStorage(), place="memory", secrets=Secrets(()), beats=False)


def join(
    storage: Storage,
    evaluator: object | None = None,
    *,
    kernel: Kernel | None = None,
    trials: int | None = 12,
    sampler: Kind = "tpe",
    ahead: int = 1,
    deadline: float | None = None,
    **more: object,
) -> Study:
    effort = Effort(sampler=sampler, trials=trials, seed=0, ahead=ahead, deadline=deadline)
    return Study(problem(kernel), storage, evaluator or InProcess(), effort, **more)  # type: ignore[arg-type]


class Scripted:
    """An evaluator that says what a function says, without running anything."""

    def __init__(self, outcome: Callable[[Config], Outcome]) -> None:
        self.outcome = outcome
        self.seen: list[Config] = []

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        self.seen.append(config)
        return self.outcome(config)


def timed(config: Config) -> Outcome:
    return Measured(time_us=true_us(config))


def by_state(study: Study) -> Counter[TrialState]:
    return Counter(trial.state for trial in study.study.trials)


def test_it_finds_the_best_and_counts_what_it_did() -> None:
    told: list[int] = []
    study = join(memory(), trials=20)
    study.run(told.append)
    assert study.timed()[0] == (BEST, 10.0)
    assert study.timed() == sorted(study.timed(), key=lambda pair: pair[1])
    assert sum(told) == study.finished() == study.ran == study.trials == 20
    assert study.ended_early is None
    assert len({tuple(trial.params.values()) for trial in study.counted()}) == 20


@pytest.mark.parametrize(
    ("sampler", "trials", "expected"), [("tpe", None, 30), ("random", None, 30), ("grid", None, 34), ("tpe", 100, 34), ("grid", 5, 5)]
)  # fmt: skip
def test_how_many_trials_there_are(sampler: Kind, trials: int | None, expected: int) -> None:
    assert len(ALL.fitting) == 34
    assert Effort(sampler=sampler, trials=trials).trials_of(ALL) == expected


def test_a_quarter_of_a_large_space_within_bounds() -> None:
    for size, expected in ((10, 10), (100, FEWEST), (200, 50), (10_000, MOST)):
        large = Candidates(values={}, fitting=tuple((n,) for n in range(size)), refused=0)
        assert Effort().trials_of(large) == expected


def test_it_begins_with_what_is_known() -> None:
    recorded = Config(constants={"BLOCK": 64, "WRONG": 0}, num_warps=8, num_stages=2)
    outside = Config(constants={"BLOCK": 256, "WRONG": 0}, num_warps=1, num_stages=1)
    older = Config(constants={"BLOCK_M": 64}, num_warps=8, num_stages=2)
    evaluator = Scripted(timed)
    join(memory(), evaluator, starts=[recorded, outside, older, recorded]).run()
    nearest = Config(constants={"BLOCK": 128, "WRONG": 0}, num_warps=1, num_stages=1)
    assert evaluator.seen[:2] == [recorded, nearest]
    assert len(evaluator.seen) == 12


def test_what_goes_wrong_is_kept_with_its_reason() -> None:
    study = join(memory(), kernel=Faulty(), trials=30)
    study.run()
    failed = [trial for trial in study.counted() if trial.state == TrialState.FAIL]
    reasons = {trial.params["WRONG"]: trial.user_attrs[REASON] for trial in failed}
    assert set(reasons) <= {1, 4, 5}
    assert all(trial.params["WRONG"] == 0 for trial in study.counted() if trial.state == TrialState.COMPLETE)
    assert reasons[4] == "ZeroDivisionError: on purpose"
    assert reasons[5] == "out of the GPU's memory"
    assert reasons[1].startswith("a wrong result: y: max error 1 ")


def test_it_ends_where_nothing_works() -> None:
    evaluator = InProcess()
    study = join(memory(), evaluator, kernel=Hopeless(), trials=30)
    study.run()
    assert len(evaluator.seen) == FAILURES
    assert study.ended_early is not None
    assert study.ended_early.startswith(f"its first {FAILURES} candidates failed, the last: a wrong result")
    assert study.timed() == []


def test_it_ends_at_once_where_no_candidate_can_work() -> None:
    evaluator = Scripted(lambda config: Failed(reason="its inputs do not fit", hopeless=True))
    study = join(memory(), evaluator)
    study.run()
    assert (len(evaluator.seen), study.ended_early) == (1, "its inputs do not fit")


def test_what_the_gpu_refuses_is_pruned() -> None:
    small = Scripted(lambda config: timed(config) if config.constants["BLOCK"] < 64 else Unfit(reason="OutOfResources"))
    study = join(memory(), small, trials=30)
    study.run()
    pruned = [trial for trial in study.counted() if trial.state == TrialState.PRUNED]
    assert pruned
    assert {trial.params["BLOCK"] for trial in pruned} == {64, 128}
    assert {trial.user_attrs[REASON] for trial in pruned} == {f"does not run on {H100.name}: OutOfResources"}


def test_slow_candidates_are_pruned_after_a_few_replays() -> None:
    study = join(memory(), sampler="random", trials=30)
    study.run()
    pruned = [trial for trial in study.counted() if trial.state == TrialState.PRUNED]
    assert len(pruned) > 5
    assert all(list(trial.intermediate_values) == [3] for trial in pruned)
    assert all(trial.number >= TIMED_BEFORE_PRUNING for trial in pruned)
    assert min(trial.intermediate_values[3] for trial in pruned) > study.timed()[0][1]


def test_a_candidate_that_somebody_enqueued_and_that_is_refused_is_pruned_unseen() -> None:
    storage, evaluator = memory(), Scripted(timed)
    study = join(storage, evaluator)
    study.study.enqueue_trial({"BLOCK": 8, "WRONG": 0, "num_warps": 8, "num_stages": 1})
    study.run()
    first = study.study.trials[0]
    assert (first.state, first.user_attrs[REASON]) == (TrialState.PRUNED, "8 warps for 8 values")
    assert len(evaluator.seen) == 11


class Compiler:
    """Compiles nothing; ``outcome`` says what came of it."""

    def __init__(self, outcome: Callable[[Launch], Compiled | CompileError]) -> None:
        self.outcome = outcome
        self.asked: list[tuple[Launch, int]] = []

    def submit(self, launch: Launch, architecture: int) -> Future[Compiled]:
        self.asked.append((launch, architecture))
        future: Future[Compiled] = Future()
        outcome = self.outcome(launch)
        if isinstance(outcome, CompileError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return future


def compiled(launch: Launch) -> Compiled | CompileError:
    """128 does not compile, 64 does not fit."""
    block = launch.constants["BLOCK"]
    return CompileError("Triton does not compile it") if block == 128 else cubin(300_000 if block == 64 else 0)


def cubin(shared_bytes: int) -> Compiled:
    return Compiled(
        architecture=90,
        cubin=b"",
        name="k",
        parameters=(),
        aligned=(),
        shared_bytes=shared_bytes,
        registers=32,
        spill_bytes=0,
        num_warps=1,
        num_ctas=1,
        global_scratch_bytes=0,
        global_scratch_align=1,
        profile_scratch_bytes=0,
    )


def test_what_does_not_compile_or_fit_never_reaches_the_gpu() -> None:
    evaluator, compiler = Scripted(timed), Compiler(compiled)
    study = join(memory(), evaluator, sampler="grid", trials=None, compiler=compiler, ahead=3)
    study.run()
    assert {config.constants["BLOCK"] for config in evaluator.seen} == {8, 16, 32}
    reasons = {t.params["BLOCK"]: t.user_attrs[REASON] for t in study.counted() if t.state == TrialState.PRUNED}
    assert reasons == {
        64: f"300000 bytes of shared memory do not fit the 232448 of {H100.name}",
        128: "Triton does not compile it",
    }
    assert len(compiler.asked) == len(ALL.fitting) == study.finished()
    assert {architecture for _, architecture in compiler.asked} == {90}
    assert all(launch.arguments["x_ptr"].is_meta for launch, _ in compiler.asked)  # type: ignore[union-attr]


def test_trials_are_compiled_ahead_while_one_is_timed() -> None:
    compiler = Compiler(lambda launch: cubin(0))
    ahead: list[int] = []

    def outcome(config: Config) -> Outcome:
        ahead.append(len(compiler.asked) - len(ahead))
        return timed(config)

    join(memory(), Scripted(outcome), sampler="grid", trials=20, compiler=compiler, ahead=4).run()
    assert max(ahead) == 4


def interrupted_after(count: int) -> Scripted:
    seen: list[Config] = []

    def outcome(config: Config) -> Outcome:
        seen.append(config)
        if len(seen) > count:
            raise KeyboardInterrupt
        return timed(config)

    return Scripted(outcome)


@pytest.mark.parametrize("ahead", [1, 3])
def test_an_interrupt_gives_its_trials_back_and_the_same_study_goes_on(ahead: int, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = join(open_storage(url), interrupted_after(5), ahead=ahead, trials=20)
    with pytest.raises(KeyboardInterrupt):
        study.run()
    states = by_state(study)
    assert states == {TrialState.COMPLETE: 5, TrialState.FAIL: ahead, TrialState.WAITING: ahead}
    aside = [trial for trial in study.study.trials if trial.state == TrialState.FAIL]
    assert {trial.user_attrs[SET_ASIDE] for trial in aside} == {"its worker was interrupted"}

    evaluator = Scripted(timed)
    again = join(open_storage(url), evaluator, ahead=ahead, trials=20)
    assert again.finished() == 5
    again.run()
    assert [params_of(config) for config in evaluator.seen[:ahead]] == [trial.params for trial in aside]
    assert len(evaluator.seen) == 15 and again.finished() == 20
    assert len({tuple(trial.params.values()) for trial in again.counted()}) == 20


def test_a_full_study_runs_nothing() -> None:
    storage = memory()
    join(storage).run()
    evaluator = Scripted(timed)
    again = join(storage, evaluator)
    again.run()
    assert (again.ran, evaluator.seen, again.finished()) == (0, [], 12)
    more = join(storage, evaluator, trials=15)
    more.run()
    assert (more.ran, more.finished()) == (3, 15)


def test_when_the_time_is_up_no_trial_begins() -> None:
    slow = Scripted(lambda config: (time.sleep(0.05), timed(config))[1])  # type: ignore[func-returns-value]
    study = join(memory(), slow, trials=30, deadline=time.monotonic() + 0.3)
    study.run()
    assert 0 < study.finished() < 20
    assert study.ended_early == "its time was up"
    assert set(by_state(study)) == {TrialState.COMPLETE}


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_workers_that_share_a_study_try_each_candidate_once(sampler: Kind, tmp_path: Path) -> None:
    url = f"journal:///{tmp_path}/study.log"
    evaluators = [Scripted(lambda config: (time.sleep(0.01), timed(config))[1]) for _ in range(3)]  # type: ignore[func-returns-value]
    joined = [join(open_storage(url), evaluator, sampler=sampler, trials=30, ahead=2) for evaluator in evaluators]
    threads = [threading.Thread(target=study.run) for study in joined]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [tuple(params_of(config).values()) for evaluator in evaluators for config in evaluator.seen]
    assert len(seen) == len(set(seen)) == 30
    assert joined[0].finished() == 30
    assert all(study.ran == len(evaluator.seen) for study, evaluator in zip(joined, evaluators, strict=True))


def ask_too(study: Study, params: dict[str, int]) -> optuna.Trial:
    """Another worker's trial, begun just before ours."""
    study.study.enqueue_trial(params)
    return study.study.ask(dict(ALL.distributions))


def test_a_twin_of_a_running_trial_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, evaluator = memory(), Scripted(timed)
    study = join(storage, evaluator, trials=3)
    params = ALL.params(ALL.fitting[0])
    other = ask_too(study, params)
    study.study.enqueue_trial(params)  # what a race between two samplers would give
    monkeypatch.setattr(studies, "_POLL_S", 0.01)
    thread = threading.Timer(0.3, lambda: study.study.tell(other, 1.0))
    thread.start()
    study.run()
    thread.join()
    twin = study.study.trials[1]
    assert twin.user_attrs[SET_ASIDE] == f"the candidate of trial {other.number}"
    assert len(evaluator.seen) == 2 and study.finished() == 3


def test_a_trial_too_many_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, evaluator = memory(), Scripted(timed)
    study = join(storage, evaluator, trials=2)
    monkeypatch.setattr(study, "_has_room", lambda trials: len(trials) < 4)  # as a race would see it
    study.run()
    assert len(evaluator.seen) == 2
    assert [trial.user_attrs.get(SET_ASIDE) for trial in study.study.trials] == [
        None,
        None,
        *["the study was full"] * 2,
    ]


def test_a_worker_waits_for_the_last_trials_of_others_and_takes_over_those_of_the_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, evaluator = memory(), Scripted(timed)
    study = join(storage, evaluator, trials=4)
    other = ask_too(study, ALL.params(ALL.fitting[0]))
    other.set_user_attr(WORKER, "elsewhere 0 0 1 1")
    monkeypatch.setattr(studies, "_POLL_S", 0.01)
    study._effort = Effort(trials=4, seed=0, interval_s=0.05, grace_s=0.3)
    study.run()
    assert study.finished() == 4 == len(evaluator.seen)
    assert study.study.trials[0].user_attrs[SET_ASIDE] == "its worker ended"
    assert params_of(evaluator.seen[-1]) == other.params


def test_a_result_that_comes_after_its_trial_was_given_up_is_dropped() -> None:
    storage = memory()
    study: Study

    def outcome(config: Config) -> Outcome:
        running = [trial for trial in study.study.trials if trial.state == TrialState.RUNNING]
        if len(study.study.trials) == 3:  # as another worker would, that took this one for dead
            study.study.tell(running[0].number, state=TrialState.FAIL)
        return Failed(reason="too late") if len(study.study.trials) == 3 else timed(config)

    study = join(storage, Scripted(outcome), trials=4)
    study.run()
    assert study.finished() == 4 == study.ran
    assert [counts(trial) for trial in study.study.trials] == [True, True, False, True, True]


def test_cases_of_one_bucket_share_the_case_of_who_came_first() -> None:
    storage = memory()
    first = Study(problem(case=CASE), storage, InProcess(), Effort(trials=2))
    later = Case(dtype="float32", dims={"size": 64})
    second = Study(problem(case=later), storage, InProcess(), Effort(trials=2))
    assert first.problem.case == second.problem.case == CASE
    assert first.study.study_name == second.study.study_name
    other = Study(problem(case=Case(dtype="float32", dims={"size": 65})), storage, InProcess(), Effort(trials=2))
    assert other.study.study_name != first.study.study_name


def test_the_name_holds_all_that_makes_times_comparable() -> None:
    name = problem().name
    for part in ("double", H100.name, "float32", "size<=64", "sources ", "triton "):
        assert part in name


def test_no_trial_runs_before_its_twin_is_looked_for() -> None:
    """The parameters of a trial in hand are in the storage while it is timed: others see them."""
    storage = memory()
    seen: list[FrozenTrial] = []

    def outcome(config: Config) -> Outcome:
        [running] = [t for t in study.study.get_trials() if t.state == TrialState.RUNNING]
        seen.append(running)
        assert config_of(running.params) == config
        return timed(config)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = join(storage, Scripted(outcome), trials=3)
        study.run()
    assert all(WORKER in trial.user_attrs for trial in seen)
