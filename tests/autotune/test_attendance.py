"""Trials whose workers died wait anew, exactly once; those of the living are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState

from autotune.attendance import BEAT, WORKER, Attendance, identity, is_gone, requeue
from autotune.sampler import SET_ASIDE, counts

SPACE = {"x": CategoricalDistribution((1, 2, 3))}
ELSEWHERE = "another-host 0 0 1 1"


@pytest.fixture(scope="module")
def gone() -> str:
    """The identity of a process of this host that has ended."""
    code = "from autotune.attendance import identity; print(identity())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(params=["database", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BaseStorage]:
    if request.param == "journal":
        yield JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield RDBStorage(
            f"sqlite:///{tmp_path}/study.db",
            heartbeat_interval=1,
            grace_period=1,
            heartbeat_stale_trial_callback=requeue,
        )


def attendance(storage: BaseStorage, *, grace_s: float = 0.5) -> Attendance:
    return Attendance(storage, heartbeat=isinstance(storage, RDBStorage), interval_s=0.2, grace_s=grace_s)


def begin(study: optuna.Study, worker: str | None) -> optuna.Trial:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = study.ask(dict(SPACE))
    if worker is not None:
        trial.set_user_attr(WORKER, worker)
    return trial


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def test_a_process_knows_itself_and_the_dead(gone: str) -> None:
    assert is_gone(identity()) is False
    assert is_gone(gone) is True
    assert is_gone(ELSEWHERE) is None
    assert is_gone("nonsense") is None


def test_a_number_that_is_used_again_is_another_process() -> None:
    *place, number, started = identity().split(" ")
    assert number == str(os.getpid())
    assert is_gone(" ".join([*place, number, str(int(started) - 1)])) is True


def test_a_dead_worker_of_this_host_is_noticed_at_once(storage: BaseStorage, gone: str) -> None:
    study = optuna.create_study(storage=storage)
    dead = begin(study, gone)
    begin(study, identity())
    attendance(storage).reclaim(study)
    attendance(storage).reclaim(study)
    assert states(study) == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    failed, _, again = study.get_trials()
    assert failed.user_attrs[SET_ASIDE] == "its worker ended"
    assert not counts(failed)
    assert again.system_attrs["fixed_params"] == dead.params


def test_a_worker_elsewhere_lives_as_long_as_it_beats(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    theirs = begin(study, ELSEWHERE)
    watcher = attendance(storage, grace_s=1.5)
    with attendance(storage) as other:
        other.enter(theirs)
        theirs.set_user_attr(WORKER, ELSEWHERE)  # as if `other` ran there
        for _ in range(12):
            watcher.reclaim(study)
            time.sleep(0.25)
        assert states(study) == [TrialState.RUNNING]
    for _ in range(20):
        watcher.reclaim(study)
        if states(study) != [TrialState.RUNNING]:
            break
        time.sleep(0.25)
    assert states(study) == [TrialState.FAIL, TrialState.WAITING]
    assert not counts(study.trials[0])


def test_a_worker_killed_before_its_first_sign_is_noticed_by_watching(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    begin(study, None)
    watcher = attendance(storage, grace_s=0.3)
    watcher.reclaim(study)
    assert states(study) == [TrialState.RUNNING]
    time.sleep(0.4)
    watcher.reclaim(study)
    assert states(study) == [TrialState.FAIL, TrialState.WAITING]


def test_a_trial_that_went_nowhere_waits_for_nobody(storage: BaseStorage, gone: str) -> None:
    study = optuna.create_study(storage=storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.ask().set_user_attr(WORKER, gone)  # killed before it had drawn its parameters
    attendance(storage).reclaim(study)
    assert states(study) == [TrialState.FAIL]


def test_own_trials_are_left_alone_and_signed(storage: BaseStorage) -> None:
    study = optuna.create_study(storage=storage)
    with attendance(storage, grace_s=0.1) as mine:
        trial = begin(study, None)
        mine.enter(trial)
        time.sleep(0.5)
        mine.reclaim(study)
        [stored] = study.trials
        assert stored.state == TrialState.RUNNING
        assert stored.user_attrs[WORKER] == identity()
        assert (BEAT in stored.user_attrs) == isinstance(storage, JournalStorage)
        study.tell(trial, 1.0)
        time.sleep(0.3)  # a sign of life for a finished trial would raise
        mine.leave(trial)
    assert states(study) == [TrialState.COMPLETE]
