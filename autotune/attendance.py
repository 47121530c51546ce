"""Which worker runs which trial, and whether it still lives.

A worker that is killed leaves its trials running in the storage. They are given up and wait to be run anew:

- at once, where the worker was on this host and its process is gone;
- by Optuna's heartbeat in a database, whose clock judges;
- elsewhere (journal file, gRPC proxy, or a worker killed before its first sign of life) when this process has watched a trial for
  a minute without seeing it change. Clocks of two hosts are never compared.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import warnings
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from autotune.sampler import SET_ASIDE, proposed

WORKER, BEAT = "worker", "beat"
"""Trial attributes: who runs it, and a number that grows while it does."""


def identity() -> str:
    """This process: host, boot, process namespace, number, and when it started (numbers are used again)."""
    return " ".join((*_here(), str(os.getpid()), _started(os.getpid()) or "0"))


def is_gone(worker: str) -> bool | None:
    """Whether a worker has ended; None where that cannot be known from here."""
    *place, number, started = ["", "", *worker.split(" ")]
    if tuple(place[2:]) != _here() or not number.isdigit():
        return None
    return _started(int(number)) != started


def requeue(study: optuna.Study, trial: FrozenTrial) -> None:
    """Lets the candidate of a trial that was given up wait for whoever asks next."""
    params = proposed(trial)
    if params:
        study.enqueue_trial(params)


class Attendance:
    """Signs of life of this worker's trials, and an eye on those of others.

    Args:
        heartbeat: whether the storage keeps heartbeats and judges them, as Optuna's databases do.
        interval_s: between two signs of life.
        grace_s: how long a trial may show none.
    """

    def __init__(self, storage: BaseStorage, *, heartbeat: bool, interval_s: float, grace_s: float) -> None:
        self._storage = storage
        self._heartbeat = heartbeat
        self._interval_s = interval_s
        self._grace_s = grace_s
        self._mine: set[int] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beats = 0
        self._thread: threading.Thread | None = None
        self._watched: dict[int, tuple[object, float]] = {}

    def __enter__(self) -> Attendance:
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join(timeout=self._interval_s)

    def enter(self, trial: optuna.Trial) -> None:
        """Signs a trial that this process begins."""
        trial.set_user_attr(WORKER, identity())
        with self._lock:
            self._mine.add(trial._trial_id)
        self._sign(trial._trial_id)

    def leave(self, trial: optuna.Trial) -> None:
        """The trial is finished."""
        with self._lock:
            self._mine.discard(trial._trial_id)

    def reclaim(self, study: optuna.Study) -> None:
        """Gives up the trials of ``study`` whose workers have ended, and lets their candidates wait anew."""
        if self._heartbeat:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial._trial_id not in self._mine and self._is_stale(trial):
                self._give_up(study, trial)

    def _is_stale(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get(WORKER)
        gone = None if worker is None else is_gone(worker)
        if gone is not None:
            return gone
        if self._heartbeat and worker is not None:
            return False  # the database judges
        sign, now = (worker, trial.user_attrs.get(BEAT)), time.monotonic()
        seen, since = self._watched.setdefault(trial._trial_id, (sign, now))
        if seen != sign:
            self._watched[trial._trial_id] = (sign, now)
            return False
        return now - since > self._grace_s

    def _give_up(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Only one of several workers that come here at once gets to the end."""
        try:
            self._storage.set_trial_user_attr(trial._trial_id, SET_ASIDE, "its worker ended")
            given_up = self._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        except UpdateFinishedTrialError:
            return
        if given_up:
            requeue(study, trial)

    def _beat_on(self) -> None:
        while not self._ended.wait(self._interval_s):
            with self._lock:
                mine = tuple(self._mine)
            self._beats += 1
            for trial_id in mine:
                try:
                    self._sign(trial_id)
                except UpdateFinishedTrialError:
                    continue
                except Exception:  # noqa: BLE001 - the storage is away: whoever uses it next says so
                    break

    def _sign(self, trial_id: int) -> None:
        if self._heartbeat:
            self._storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]
        else:
            self._storage.set_trial_user_attr(trial_id, BEAT, self._beats)


def _here() -> tuple[str, str, str]:
    return socket.gethostname().replace(" ", "_"), _text("/proc/sys/kernel/random/boot_id"), _namespace()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "-"


def _started(process: int) -> str | None:
    """When a process started, in ticks since boot; None if there is none. A zombie counts as none."""
    fields = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "-"
