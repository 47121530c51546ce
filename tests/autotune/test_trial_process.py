"""Candidates that go wrong leave the process that asked for them whole."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotune.kernel import Config
from autotune.measurement import REPEATS
from autotune.trial_process import TrialProcess
from autotune.trial_worker import Failed, Measured, Outcome, Stopped
from tests.autotune.tiny import CASE, Clock, Double, true_us


@pytest.fixture(scope="module")
def process() -> Iterator[TrialProcess]:
    with TrialProcess(Clock()) as started:
        yield started


def config(wrong: int = 0, warps: int = 1) -> Config:
    return Config(constants={"BLOCK": 64, "WRONG": wrong}, num_warps=warps, num_stages=1)


def evaluate(
    process: TrialProcess, chosen: Config, stop_at: int | None = None
) -> tuple[Outcome, list[tuple[int, float]]]:
    steps = []

    def go_on(repeats: int, median_us: float) -> bool:
        steps.append((repeats, median_us))
        return repeats != stop_at

    return process.evaluate(Double(), CASE, chosen, go_on), steps


def test_a_right_candidate_is_timed_in_steps(process: TrialProcess) -> None:
    outcome, steps = evaluate(process, config())
    assert outcome == Measured(time_us=true_us(config()))
    assert steps == [(repeats, true_us(config())) for repeats in REPEATS]


def test_a_slow_one_stops_when_it_is_told(process: TrialProcess) -> None:
    outcome, steps = evaluate(process, config(), stop_at=REPEATS[0])
    assert outcome == Stopped()
    assert len(steps) == 1


def test_a_wrong_one_is_not_timed(process: TrialProcess) -> None:
    outcome, steps = evaluate(process, config(wrong=1))
    assert isinstance(outcome, Failed)
    assert outcome.reason.startswith("a wrong result: y: max error 1 ")
    assert steps == []


@pytest.mark.parametrize(
    ("wrong", "reason"), [(3, "its process ended: SIGSEGV"), (4, "ZeroDivisionError: on purpose"), (5, "out of the GPU's memory")]
)  # fmt: skip
def test_after_a_failure_the_next_one_is_timed(process: TrialProcess, wrong: int, reason: str) -> None:
    outcome, _ = evaluate(process, config(wrong))
    assert isinstance(outcome, Failed)
    assert outcome.reason.startswith(reason)
    assert not outcome.hopeless
    assert evaluate(process, config())[0] == Measured(time_us=true_us(config()))


def test_one_that_hangs_is_killed_and_the_next_one_is_timed() -> None:
    with TrialProcess(Clock(), limit_s=60) as process:
        evaluate(process, config())  # starting does not count
        process.limit_s = 1.0
        began = time.monotonic()
        outcome, _ = evaluate(process, config(wrong=2))
        assert outcome == Failed(reason="took longer than 1 s")
        assert time.monotonic() - began < 20
        process.limit_s = 60
        assert evaluate(process, config())[0] == Measured(time_us=true_us(config()))


def test_an_error_of_who_listens_ends_the_process_in_the_middle_of_its_answer() -> None:
    class Gone(Exception):
        pass

    def go_on(repeats: int, median_us: float) -> bool:
        raise Gone

    with TrialProcess(Clock()) as process:
        with pytest.raises(Gone):
            process.evaluate(Double(), CASE, config(), go_on)
        assert evaluate(process, config())[0] == Measured(time_us=true_us(config()))


HANGING = """
from tests.autotune.test_trial_process import config, evaluate
from tests.autotune.tiny import Clock
from autotune.trial_process import TrialProcess
process = TrialProcess(Clock())
evaluate(process, config())
print(process._process.pid, flush=True)
evaluate(process, config(wrong=2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process dies with its parent on Linux only")
def test_it_ends_with_its_parent_even_in_a_candidate_that_hangs() -> None:
    parent = subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().strip()
    assert child.exists()
    time.sleep(0.5)
    parent.kill()
    parent.communicate()
    limit = time.monotonic() + 20
    while runs(child) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not runs(child)


def runs(process: Path) -> bool:
    """Whether a process is there, and no zombie that nobody has waited for yet."""
    try:
        return "\nState:\tZ" not in (process / "status").read_text()
    except OSError:
        return False
