"""Several workers on one study in a real PostgreSQL, one of which is killed.

Needs PostgreSQL's programs (Debian: ``apt-get install postgresql``); the server is started here and removed again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from autotune.attendance import WORKER
from autotune.candidates import Candidates, config_of
from autotune.record_file import read
from autotune.sampler import SET_ASIDE, counts
from autotune.storage import Storage, open_storage
from runtimes.errors import Gemma3CompileError, HostError, UsageError
from tests.autotune import postgresql
from tests.autotune.postgresql import Server
from tests.autotune.tiny import H100, problem, true_us

pytestmark = pytest.mark.skipif(
    postgresql.programs() is None, reason="PostgreSQL is not installed; Debian: apt-get install postgresql"
)
WORKERS = 4
CANDIDATE_S = 0.3
"""How long a candidate takes in a worker: long enough that all of them get some."""
LIMIT_S = 180


@pytest.fixture
def server() -> Iterator[Server]:
    with postgresql.running() as running:
        yield running


def start(server: Server, records: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.autotune.tune_worker", server.url, str(records), str(CANDIDATE_S)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def trials_of(storage: Storage) -> list[FrozenTrial]:
    """The study's trials; none as long as no worker has made it."""
    try:
        return optuna.load_study(study_name=problem().name, storage=storage.optuna).trials
    except KeyError:
        return []


def number_of(trial: FrozenTrial) -> int:
    """The process that runs or ran a trial."""
    return int(trial.user_attrs[WORKER].split(" ")[-2])


def kill_one(workers: list[subprocess.Popen[str]], storage: Storage) -> FrozenTrial:
    """Kills a worker in the middle of a trial, once all of them work; returns the trial."""
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit:
        signed = [trial for trial in trials_of(storage) if WORKER in trial.user_attrs]
        if len({number_of(trial) for trial in signed}) == WORKERS:
            victim = workers[0]
            victim.send_signal(signal.SIGSTOP)  # so that the trial does not end between the look and the kill
            running = [t for t in trials_of(storage) if t.state == TrialState.RUNNING and WORKER in t.user_attrs]
            mine = [trial for trial in running if number_of(trial) == victim.pid]
            if mine:
                victim.kill()
                victim.wait()
                return mine[0]
            victim.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    pytest.fail(f"{WORKERS} workers did not begin within {LIMIT_S} s")


def test_four_workers_one_killed_no_trial_lost_or_counted_twice(server: Server, tmp_path: Path) -> None:
    storage = open_storage(server.url)
    workers = [start(server, tmp_path / str(number)) for number in range(WORKERS)]
    try:
        killed = kill_one(workers, storage)
        said = [worker.communicate(timeout=LIMIT_S)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()

    trials = trials_of(storage)
    counted = [trial for trial in trials if counts(trial)]
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in counted)
    every = Candidates.of(problem().kernel, problem().case, H100)
    assert Counter(every.key(trial.params) for trial in counted) == Counter(every.fitting), (
        "one trial for each candidate"
    )
    assert all(
        trial.value == true_us(config_of(trial.params)) for trial in counted if trial.state == TrialState.COMPLETE
    )

    assert trials[killed.number].state == TrialState.FAIL
    assert trials[killed.number].user_attrs[SET_ASIDE] == "its worker ended"
    [again] = [trial for trial in counted if trial.params == killed.params]
    assert number_of(again) != number_of(killed)
    rest = [trial for trial in trials if not counts(trial)]
    assert {trial.state for trial in rest} == {TrialState.FAIL}, "nothing runs or waits any more"
    assert len({number_of(trial) for trial in counted}) >= WORKERS - 1

    results = [text for worker, text in zip(workers, said, strict=True) if worker.returncode == 0]
    assert len(results) == WORKERS - 1, said
    assert all("BLOCK=32 WRONG=0 warps=4 stages=2, 10.00 µs" in text for text in results)
    assert postgresql.PASSWORD not in "".join(said)
    for number, worker in enumerate(workers):
        files = list((tmp_path / str(number)).glob("*.json"))
        assert len(files) == (worker.returncode == 0), "the killed worker wrote no record, each other one its own"
        assert all(len(records) == 1 for file in files for records in read(file).values())


def said_of(error: Gemma3CompileError) -> str:
    """Everything that a reader or a traceback could show of an error."""
    chain: list[BaseException] = [error]
    while following := (chain[-1].__cause__ or chain[-1].__context__):
        chain.append(following)
    return " ".join([error.hint or "", *(f"{link!s} {link!r}" for link in chain)])


def test_refusals_say_what_to_do_and_not_the_password(server: Server) -> None:
    with pytest.raises(UsageError, match="refuses the user `tuner`") as refused:
        open_storage(server.url_as("wr0ng/pass"))
    assert "wr0ng" not in said_of(refused.value)
    with pytest.raises(UsageError, match='database "nowhere" does not exist') as unknown:
        open_storage(server.url_as(postgresql.PASSWORD, "nowhere"))
    assert "s3cret" not in said_of(unknown.value)
    storage = open_storage(server.url)
    server.stop()
    try:
        with pytest.raises(HostError, match="cannot be reached") as unreachable:
            open_storage(server.url)
        with pytest.raises(HostError, match="failed") as lost, storage.watched():
            trials_of(storage)
    finally:
        server.start()
    assert "s3cret" not in said_of(unreachable.value) + said_of(lost.value) + repr(storage.place)
