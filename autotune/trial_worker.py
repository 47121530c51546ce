"""The process that checks and times candidates: it holds the GPU, so that a candidate may hang or crash alone.

Only :mod:`autotune.trial_process` starts it, as ``python -m autotune.trial_worker``. It reads :class:`Candidate` from
stdin, answers with a :class:`Step` after each stretch of replays and waits for whether to go on, and ends with what
came of it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import torch

from autotune.correctness import Expected
from autotune.kernel import Case, Config, Kernel
from autotune.measurement import Meter, running_medians
from autotune.messages import receive, send

GoOn = Callable[[int, float], bool]
"""Hears how many replays were timed and their median in microseconds; says whether to go on."""
_KILL_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What to run, and how to time it."""

    kernel: Kernel
    case: Case
    config: Config
    meter: Meter


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The process has started."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The running median after ``repeats`` replays."""

    repeats: int
    median_us: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """It is right, and takes so long."""

    time_us: float


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """It is right, and was found too slow."""


@dataclass(frozen=True, kw_only=True)
class Unfit:
    """Triton or the driver refuses it: too much shared memory, too many registers."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Failed:
    """It computes something else, crashed or hung.

    Args:
        hopeless: so will every other candidate of this case.
        lost: the process can no longer use the GPU, and ends.
    """

    reason: str
    hopeless: bool = False
    lost: bool = False


Outcome = Measured | Stopped | Unfit | Failed


class Cases:
    """The inputs and oracles of the cases seen last: making them anew for each candidate would take most of a study's time.

    Args:
        most_bytes: of tensors to keep; None takes a quarter of the GPU's memory.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self._most_bytes = most_bytes
        self._kept: dict[tuple[str, str, str], Expected] = {}

    def expected(self, candidate: Candidate) -> Expected:
        """What a candidate is held against.

        Raises:
            torch.OutOfMemoryError: it does not fit beside nothing else.
        """
        key = self._key(candidate)
        known = self._kept.pop(key, None)
        if known is None:
            try:
                known = _expected(candidate)
            except torch.OutOfMemoryError:
                if not self._kept:
                    raise
                self.clear()
                known = _expected(candidate)
        self._kept[key] = known  # the last one is the one that was used last
        limit = _quarter_of_memory(candidate.meter.device) if self._most_bytes is None else self._most_bytes
        while len(self._kept) > 1 and sum(map(_bytes_of, self._kept.values())) > limit:
            del self._kept[next(iter(self._kept))]
        return known

    def forget(self, candidate: Candidate) -> None:
        """A candidate that went wrong may have written to inputs that were not its own to write."""
        self._kept.pop(self._key(candidate), None)

    def clear(self) -> None:
        """Gives the memory back to the GPU."""
        self._kept.clear()
        torch.cuda.empty_cache()

    def __len__(self) -> int:
        return len(self._kept)

    @staticmethod
    def _key(candidate: Candidate) -> tuple[str, str, str]:
        return candidate.kernel.name, str(candidate.case), candidate.meter.device


def _expected(candidate: Candidate) -> Expected:
    kernel, case = candidate.kernel, candidate.case
    return Expected.of(kernel, case, kernel.inputs(case, device=candidate.meter.device))


def _bytes_of(expected: Expected) -> int:
    tensors = [*expected.inputs.values(), *(output.exact for output in expected.outputs.values())]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _quarter_of_memory(device: str) -> int:
    if torch.device(device).type != "cuda":
        return 2**30
    return int(torch.cuda.get_device_properties(device).total_memory) // 4


def evaluate(candidate: Candidate, go_on: GoOn, cases: Cases) -> Outcome:
    """Holds a candidate against its oracle, and only then times it."""
    try:
        expected = cases.expected(candidate)
    except torch.OutOfMemoryError:
        cases.clear()
        return Failed(reason="its inputs do not fit the GPU's free memory", hopeless=True)
    try:
        outcome = _checked_and_timed(candidate, expected, go_on)
    except torch.OutOfMemoryError:
        cases.clear()
        outcome = Failed(reason="out of the GPU's memory")
    except Exception as error:  # noqa: BLE001 - whatever a candidate does, the study goes on
        said = f"{type(error).__name__}: {error}".strip()
        outcome = Unfit(reason=said) if _refused(error) else Failed(reason=said)
    if isinstance(outcome, Failed):
        cases.forget(candidate)
    return outcome


def _checked_and_timed(candidate: Candidate, expected: Expected, go_on: GoOn) -> Outcome:
    kernel, case, config, meter = candidate.kernel, candidate.case, candidate.config, candidate.meter
    for comparison in expected.compare(config):
        if not comparison.passed:
            return Failed(reason=f"a wrong result: {comparison}")
    written = expected.in_place
    inputs = {name: tensor.clone() if name in written else tensor for name, tensor in expected.inputs.items()}
    median_us = float("inf")
    for repeats, median_us in running_medians(meter.times_us(kernel, case, config, inputs, written)):
        if not go_on(repeats, median_us):
            return Stopped()
    return Measured(time_us=median_us)


def _refused(error: Exception) -> bool:
    from triton.errors import TritonError  # of its compiler, of ptxas, or where resources do not suffice

    return isinstance(error, TritonError)


def _gpu_is_lost() -> bool:
    """After an illegal access every further call of the process fails."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> None:
    """Serves on this process's own pipes; what a candidate prints goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    send(replies, Ready())
    cases = Cases()

    def go_on(repeats: int, median_us: float) -> bool:
        send(replies, Step(repeats=repeats, median_us=median_us))
        return receive(requests) is True

    while isinstance(candidate := receive(requests), Candidate):
        outcome = evaluate(candidate, go_on, cases)
        if isinstance(outcome, Failed) and _gpu_is_lost():
            send(replies, replace(outcome, lost=True))
            break
        send(replies, outcome)


if __name__ == "__main__":
    # Pickle must find the classes under the module's real name, not under `__main__`.
    import_module("autotune.trial_worker").main()
