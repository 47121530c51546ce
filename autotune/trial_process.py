"""Runs candidates in a process of their own, which is killed where one takes too long, and started anew."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Protocol

from autotune.child_process import ChildProcess
from autotune.kernel import Case, Config, Kernel
from autotune.measurement import GraphMeter, Meter
from autotune.trial_worker import Candidate, Failed, GoOn, Measured, Outcome, Ready, Step, Stopped, Unfit
from runtimes.errors import HostError

START_S = 300.0
"""How long the process may take to start: importing torch from a slow disk takes a minute."""
LIMIT_S = 60.0
"""How long one candidate may take to be checked and timed."""


class Evaluator(Protocol):
    """What checks and times a candidate."""

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        """Whatever the candidate does, its outcome; only a broken host raises."""
        ...


class TrialProcess:
    """An evaluator that survives its candidates.

    Args:
        meter: None takes the GPU.
        limit_s: for each candidate.
    """

    def __init__(self, meter: Meter | None = None, *, limit_s: float = LIMIT_S) -> None:
        self.meter = meter or GraphMeter()
        self.limit_s = limit_s
        self._process: ChildProcess | None = None

    def start(self) -> None:
        """Starts the process now, rather than with the first candidate.

        Raises:
            HostError: it does not start.
        """
        self._started()

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        """Starts the process if there is none.

        Raises:
            HostError: the process does not start.
        """
        process = self._started()
        try:
            with process.within(self.limit_s) as late:
                candidate = Candidate(kernel=kernel, case=case, config=config, meter=self.meter)
                outcome = _asked(process, candidate, go_on)
        except BaseException:
            self.close()  # it may be in the middle of an answer
            raise
        if outcome is not None:
            if late.is_set() or (isinstance(outcome, Failed) and outcome.lost):
                self.close()
            return outcome
        ending = process.ending()
        self.close()
        if late.is_set():
            return Failed(reason=f"took longer than {self.limit_s:g} s")
        return Failed(reason=f"its process ended: {ending}")

    def close(self) -> None:
        """Ends the process, at once."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> TrialProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> ChildProcess:
        if self._process is not None and self._process.alive:
            return self._process
        self.close()
        process = self._process = ChildProcess("autotune.trial_worker", os.environ)
        with process.within(START_S) as late:
            ready = process.receive()
        if not isinstance(ready, Ready):
            why = f"nothing came within {START_S:g} s" if late.is_set() else process.ending()
            self.close()
            raise HostError(f"the process that runs candidates does not start: {why}")
        return process


def _asked(process: ChildProcess, candidate: Candidate, go_on: GoOn) -> Outcome | None:
    """None where the process ended instead of answering."""
    message: object = candidate
    while isinstance(reply := process.exchange(message), Step):
        message = go_on(reply.repeats, reply.median_us)
    return reply if isinstance(reply, Measured | Stopped | Unfit | Failed) else None
