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

from autotune.correctness import compare
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


def evaluate(candidate: Candidate, go_on: GoOn) -> Outcome:
    """Holds a candidate against its oracle, and only then times it."""
    kernel, case, config, meter = candidate.kernel, candidate.case, candidate.config, candidate.meter
    try:
        inputs = kernel.inputs(case, device=meter.device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return Failed(reason="its inputs do not fit the GPU's free memory", hopeless=True)
    try:
        comparisons = compare(kernel, case, config, inputs)
        for comparison in comparisons:
            if not comparison.passed:
                return Failed(reason=f"a wrong result: {comparison}")
        in_place = {comparison.name for comparison in comparisons} & inputs.keys()
        median_us = float("inf")
        for repeats, median_us in running_medians(meter.times_us(kernel, case, config, inputs, in_place)):
            if not go_on(repeats, median_us):
                return Stopped()
        return Measured(time_us=median_us)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return Failed(reason="out of the GPU's memory")
    except Exception as error:  # noqa: BLE001 - whatever a candidate does, the study goes on
        said = f"{type(error).__name__}: {error}".strip()
        return Unfit(reason=said) if _refused(error) else Failed(reason=said)


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

    def go_on(repeats: int, median_us: float) -> bool:
        send(replies, Step(repeats=repeats, median_us=median_us))
        return receive(requests) is True

    while isinstance(candidate := receive(requests), Candidate):
        outcome = evaluate(candidate, go_on)
        if isinstance(outcome, Failed) and _gpu_is_lost():
            send(replies, replace(outcome, lost=True))
            break
        send(replies, outcome)


if __name__ == "__main__":
    # Pickle must find the classes under the module's real name, not under `__main__`.
    import_module("autotune.trial_worker").main()
