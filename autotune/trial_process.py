"""Runs candidates in a process of their own, which is killed where one takes too long, and started anew."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import IO, Protocol

from autotune.compile_worker import receive, send
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
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        """Starts the process if there is none.

        Raises:
            HostError: the process does not start.
        """
        process = self._started()
        late = threading.Event()
        timer = threading.Timer(self.limit_s, _kill, (process, late))
        timer.start()
        try:
            outcome = self._ask(process, Candidate(kernel=kernel, case=case, config=config, meter=self.meter), go_on)
        except BaseException:
            self.close()  # it may be in the middle of an answer
            raise
        finally:
            timer.cancel()
        if outcome is not None:
            if late.is_set() or (isinstance(outcome, Failed) and outcome.lost):
                self.close()
            return outcome
        if not late.is_set():
            _await(process)
        self.close()
        if late.is_set():
            return Failed(reason=f"took longer than {self.limit_s:g} s")
        return Failed(reason=f"its process ended: {self._ending(process)}")

    def close(self) -> None:
        """Ends the process, at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # what could not be sent any more
                    pipe.close()
            self._process = None

    def __enter__(self) -> TrialProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, process: subprocess.Popen[bytes], candidate: Candidate, go_on: GoOn) -> Outcome | None:
        """None where the process ended instead of answering."""
        message: object = candidate
        while isinstance(reply := _exchanged(process, message), Step):
            message = go_on(reply.repeats, reply.median_us)
        return reply if isinstance(reply, Measured | Stopped | Unfit | Failed) else None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._log.seek(0)
        self._log.truncate()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "autotune.trial_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,  # an interrupt at the terminal is the parent's to handle
        )
        assert process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(START_S, _kill, (process, late))
        timer.start()
        ready = receive(process.stdout)
        timer.cancel()
        if not isinstance(ready, Ready):
            self.close()
            why = f"nothing came within {START_S:g} s" if late.is_set() else self._ending(process)
            raise HostError(f"the process that runs candidates does not start: {why}")
        return process

    def _ending(self, process: subprocess.Popen[bytes]) -> str:
        """How a process that is no more ended, and its last words."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        code = process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}, {lines[-1]}" if lines else how


def _exchanged(process: subprocess.Popen[bytes], message: object) -> object | None:
    assert process.stdin is not None and process.stdout is not None
    try:
        send(process.stdin, message)
        return receive(process.stdout)
    except OSError:
        return None


def _await(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end of a process that has closed its pipes."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)


def _kill(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    process.kill()
