"""What is kept between candidates of one case, and what a candidate that went wrong takes with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pytest
import torch

from autotune.kernel import Case, Config, Kernel, Tensors
from autotune.trial_worker import Candidate, Cases, Failed, Measured, evaluate
from tests.autotune.tiny import CASE, Clock, Double


class Counting(Double):
    """Counts its inputs and its oracles; ``y`` is written in place where ``size`` is even."""

    def __init__(self, *, out_of_memory: int = 0) -> None:
        self.made: list[int] = []
        self.oracles = 0
        self.out_of_memory = out_of_memory

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        if self.out_of_memory and self.made:
            self.out_of_memory -= 1
            raise torch.OutOfMemoryError("on purpose")
        self.made.append(case.dims["size"])
        return super().inputs(case, device=device, seed=seed) | {"y": torch.ones(case.dims["size"])}

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        return {}

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        self.oracles += 1
        return super().oracle(case, inputs)


@dataclass(frozen=True, kw_only=True)
class Spoiling(Clock):
    """Leaves nothing of what a kernel writes in place."""

    def times_us(
        self, kernel: Kernel, case: Case, config: Config, inputs: Tensors, in_place: Collection[str]
    ) -> Iterator[float]:
        assert set(in_place) == {"y"}
        inputs["y"].fill_(float("nan"))
        return super().times_us(kernel, case, config, inputs, in_place)


def candidate(kernel: Kernel, size: int = 40, *, wrong: int = 0, block: int = 64) -> Candidate:
    config = Config(constants={"BLOCK": block, "WRONG": wrong}, num_warps=2, num_stages=1)
    return Candidate(kernel=kernel, case=Case(dtype="float32", dims={"size": size}), config=config, meter=Spoiling())


def run(each: Candidate, cases: Cases) -> object:
    return evaluate(each, lambda repeats, median_us: True, cases)


def test_a_case_is_made_once_for_all_of_its_candidates() -> None:
    kernel, cases = Counting(), Cases()
    for block in (32, 64, 128):
        assert isinstance(run(candidate(kernel, block=block), cases), Measured)
    assert kernel.made == [40]
    assert kernel.oracles == 2, "in fp32, and in the same dtype"


def test_what_a_candidate_writes_in_place_is_no_other_candidates_input() -> None:
    kernel, cases = Counting(), Cases()
    expected = cases.expected(candidate(kernel))
    run(candidate(kernel), cases)
    assert expected.in_place == {"y"}
    assert expected.inputs["y"].tolist() == [1.0] * 40


@pytest.mark.parametrize("wrong", [1, 4])
def test_after_a_failure_its_case_is_made_anew(wrong: int) -> None:
    kernel, cases = Counting(), Cases()
    run(candidate(kernel), cases)
    run(candidate(kernel, 20), cases)
    assert isinstance(run(candidate(kernel, wrong=wrong), cases), Failed)
    assert len(cases) == 1
    assert isinstance(run(candidate(kernel), cases), Measured)
    assert kernel.made == [40, 20, 40]


def test_the_case_that_was_used_last_is_kept() -> None:
    kernel, cases = Counting(), Cases(most_bytes=3 * 4 * (40 + 30))  # x, y and the oracle's y of two cases
    for size in (40, 20, 40, 30, 40):
        run(candidate(kernel, size), cases)
    assert kernel.made == [40, 20, 30]
    run(candidate(kernel, 400), cases)
    assert len(cases) == 1, "one alone is kept, however large"


def test_a_case_that_does_not_fit_beside_others_is_made_without_them() -> None:
    kernel, cases = Counting(out_of_memory=1), Cases()
    run(candidate(kernel, 40), cases)
    assert isinstance(run(candidate(kernel, 20), cases), Measured)
    assert len(cases) == 1
    kernel.out_of_memory = 2
    outcome = run(candidate(kernel, 10), cases)
    assert outcome == Failed(reason="its inputs do not fit the GPU's free memory", hopeless=True)
    assert len(cases) == 0


def test_kernels_and_clocks_do_not_share_cases() -> None:
    cases = Cases()
    run(candidate(Counting()), cases)
    plain = Candidate(kernel=Double(), case=CASE, config=candidate(Double()).config, meter=Clock())
    assert isinstance(run(plain, cases), Measured)
