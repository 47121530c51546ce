"""A process of our own that answers messages, and that may hang or crash without harm to its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from autotune.messages import receive, send


class ChildProcess:
    """Starts ``python -m MODULE``, which finds what its parent finds and reads messages from its stdin.

    Args:
        environment: of the process.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**environment, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # an interrupt at the terminal is the parent's to handle
        )

    @property
    def pid(self) -> int:
        """The operating system's number of it."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def receive(self) -> object | None:
        """The next message; None where it ended instead."""
        assert self._process.stdout is not None
        return receive(self._process.stdout)

    def exchange(self, message: object) -> object | None:
        """Sends a message and waits for the answer; None where it ended instead."""
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, message)
            return self.receive()
        except OSError:
            return None

    @contextmanager
    def within(self, limit_s: float) -> Iterator[threading.Event]:
        """Kills it where the block takes longer; the event tells whether that happened."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s, kill)
        timer.start()
        try:
            yield late
        finally:
            timer.cancel()

    def ending(self) -> str:
        """How it ended, after it closed its pipes, and its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        code = self._process.returncode
        how = "it still runs" if code is None else signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}, {lines[-1]}" if lines else how

    def kill(self) -> None:
        """Ends it at once. Other threads may still wait for its answer, and get none."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends it at once and lets go of its pipes; no other thread may be using it."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            with contextlib.suppress(OSError):  # what could not be sent any more
                stream.close()
