"""The sizes of plans."""

from __future__ import annotations

import pytest

from graphs.trt.profiles import DECODE, PREFILL, PlanSizes, Range, decoder_profiles, dims_of, vision_profiles
from runtimes.errors import UsageError


def test_a_decoder_has_one_profile_for_prompts_and_one_for_tokens() -> None:
    profiles = decoder_profiles(PlanSizes(batch=3, chunk=2048))
    assert len(profiles) == 2
    batch, one = Range(least=1, best=1, most=3), Range(least=1, best=1, most=1)
    assert profiles[PREFILL] == {
        "B": batch,
        "S": Range(least=2, best=1024, most=2048),
        "R": one,
        "M": Range(least=1, best=1, most=2048),
    }
    assert profiles[DECODE] == {"B": batch, "S": one, "R": one, "M": one}


def test_a_short_chunk_is_its_own_best() -> None:
    assert decoder_profiles(PlanSizes(chunk=2))[PREFILL]["S"] == Range(least=2, best=2, most=2)


def test_vision_takes_several_pictures() -> None:
    assert vision_profiles(PlanSizes(images=4)) == ({"N": Range(least=1, best=1, most=4)},)


def test_three_shapes_of_an_input() -> None:
    profile = decoder_profiles(PlanSizes(batch=3, chunk=64))[PREFILL]
    assert dims_of(("B", "S"), profile) == ((1, 2), (1, 64), (3, 64))
    assert dims_of(("B", 2, 16, 32), profile) == ((1, 2, 16, 32), (1, 2, 16, 32), (3, 2, 16, 32))
    with pytest.raises(UsageError, match="no profile says how large the dimension 'N'"):
        dims_of(("N", 3), profile)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"chunk": 1}, {"images": 0}])
def test_sizes_that_make_no_plan(sizes: dict[str, int]) -> None:
    (name,) = sizes
    with pytest.raises(UsageError, match=f"`{name} >= "):
        PlanSizes(**sizes)


@pytest.mark.parametrize("bounds", [(0, 1, 1), (2, 1, 3), (1, 4, 3)])
def test_a_range_that_is_none(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="1 <= least <= best <= most"):
        Range(least=bounds[0], best=bounds[1], most=bounds[2])
