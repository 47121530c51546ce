"""What may be tried, and how a candidate turns into parameters and back."""

from __future__ import annotations

import pytest

from autotune.candidates import Candidates, config_of, params_of
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Space
from autotune.registry import KERNELS
from autotune.tuning import problems
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from runtimes.errors import UsageError
from tests.autotune.tiny import CASE, H100, Double

ALL = Candidates.of(Double(), CASE, H100)


def test_a_refused_candidate_is_none() -> None:
    assert len(ALL.fitting) + ALL.refused == 5 * 4 * 2
    assert ALL.refused == 6, "blocks of 8 with 4 or 8 warps, and of 16 with 8, in two numbers of stages"
    assert all(Double().refusal(CASE, config_of(ALL.params(key)), H100) is None for key in ALL.fitting)


def test_a_candidate_goes_to_optuna_and_back() -> None:
    config = Config(constants={"BLOCK": 32, "WRONG": 0}, num_warps=4, num_stages=2)
    assert params_of(config) == {"BLOCK": 32, "WRONG": 0, "num_warps": 4, "num_stages": 2}
    assert config_of(params_of(config)) == config
    key = ALL.key(params_of(config))
    assert key == (32, 0, 4, 2)
    assert ALL.params(key) == params_of(config)
    assert ALL.distributions["BLOCK"].choices == (8, 16, 32, 64, 128)


@pytest.mark.parametrize(
    "changed", [{"BLOCK": 8, "num_warps": 8}, {"BLOCK": 33}, {"SPLIT": 1}], ids=["refused", "no value", "no parameter"]
)
def test_what_is_no_candidate_has_no_key(changed: dict[str, int]) -> None:
    assert ALL.key({"BLOCK": 32, "WRONG": 0, "num_warps": 4, "num_stages": 2} | changed) is None


def test_nearest_counts_steps_along_every_parameter() -> None:
    among = [(128, 0, 4, 1), (32, 0, 1, 2), (64, 0, 2, 2), (32, 0, 4, 1)]
    assert ALL.nearest({"BLOCK": 64, "WRONG": 0, "num_warps": 4, "num_stages": 2}, among) == [(64, 0, 2, 2)]
    both = ALL.nearest({"BLOCK": 64, "WRONG": 0, "num_warps": 4, "num_stages": 1}, among)
    assert set(both) == {(128, 0, 4, 1), (32, 0, 4, 1)}


def test_nearest_to_a_value_that_is_none_of_the_space() -> None:
    outside = {"BLOCK": 1000, "WRONG": 0, "num_warps": 3, "num_stages": 2}
    assert ALL.nearest(outside, ALL.fitting) == [(128, 0, 2, 2)]


def test_a_part_of_the_space() -> None:
    part = Space(constants={"BLOCK": (32,), "WRONG": (0,)}, num_warps=(1, 4), num_stages=(2,))
    assert Candidates.of(Double(), CASE, H100, part).fitting == ((32, 0, 1, 2), (32, 0, 4, 2))


class Refused(Double):
    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        return "too much shared memory"


def test_where_nothing_fits_the_reason_is_said() -> None:
    with pytest.raises(UsageError, match=r"none of the 40 candidates of double .* fits NVIDIA H100.*: too much shared"):
        Candidates.of(Refused(), CASE, H100)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_has_several_candidates(name: str) -> None:
    models = [(model_shapes(preset("4b")), (1024,))]
    problem = problems([KERNELS[name]], models, H100, batches=[1], dtypes=["bfloat16"])[0]
    assert len(Candidates.of(problem.kernel, problem.case, H100).fitting) > 5
