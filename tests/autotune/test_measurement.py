"""Timing: the arithmetic anywhere, the clock on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from autotune.gpu import present
from autotune.kernel import Case, Config
from autotune.kernels.rms_norm import RmsNorm
from autotune.measurement import MOST_SETS, GraphMeter, buffer_sets, kernel_us, running_medians
from tests.autotune.tiny import CASE, Clock, Double, true_us

MIB = 2**20


def test_medians_are_of_all_times_so_far_and_no_more_are_taken() -> None:
    times = iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert list(running_medians(times, (1, 2, 5))) == [(1, 9.0), (2, 5.0), (5, 3.0)]
    assert next(times) == 5.0


@pytest.mark.parametrize(
    ("set_bytes", "sets"),
    [
        (1, MOST_SETS),
        (MIB, 100),
        (30 * MIB, 4),
        (100 * MIB, 1),
        (5000 * MIB, 1),
    ],
)
def test_buffers_exceed_the_cache_twice(set_bytes: int, sets: int) -> None:
    assert buffer_sets(set_bytes, l2_bytes=50 * MIB, free_bytes=80_000 * MIB) == sets


def test_buffers_leave_half_the_free_memory() -> None:
    assert buffer_sets(30 * MIB, l2_bytes=50 * MIB, free_bytes=120 * MIB) == 2
    assert buffer_sets(30 * MIB, l2_bytes=50 * MIB, free_bytes=0) == 1


def test_a_kernel_is_timed_by_the_meter_that_is_given() -> None:
    config = Config(constants={"BLOCK": 64, "WRONG": 0}, num_warps=2, num_stages=1)
    assert kernel_us(Double(), CASE, config, Clock()) == true_us(config) == 15.5


@pytest.mark.gpu
def test_a_large_norm_takes_as_long_as_its_bytes() -> None:
    kernel, case = RmsNorm(), Case(dtype="bfloat16", dims={"rows": 8192, "hidden": 3840, "residual": 1})
    gpu = present()
    floor_us = kernel.cost(case).floor_s(gpu) * 1e6
    time_us = kernel_us(kernel, case, kernel.default(case, gpu))
    assert 0.9 * floor_us < time_us < 3 * floor_us


@pytest.mark.gpu
def test_a_small_norm_does_not_count_its_launch() -> None:
    kernel, case = RmsNorm(), Case(dtype="bfloat16", dims={"rows": 1, "hidden": 2560, "residual": 1})
    time_us = kernel_us(kernel, case, kernel.default(case, present()))
    assert 0.5 < time_us < 6, "one launch from the host costs more than that"


@pytest.mark.gpu
def test_times_repeat_and_inputs_written_in_place_are_restored() -> None:
    kernel, case = RmsNorm(), Case(dtype="bfloat16", dims={"rows": 512, "hidden": 2560, "residual": 1})
    inputs = kernel.inputs(case, device="cuda")
    before = inputs["h"].clone()
    times = GraphMeter().times_us(kernel, case, kernel.default(case, present()), inputs, {"h"})
    [*_, first, second] = list(itertools.islice(times, 9))
    assert abs(first - second) < 0.2 * first
    rounds = (inputs["h"].float() - before.float()).abs().max()
    assert torch.isfinite(rounds), "the residual grows by one replay's rounds only"
