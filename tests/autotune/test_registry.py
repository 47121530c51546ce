"""What every registered kernel must keep to, on the cases of every model size."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import get_args

import pytest
import torch

from autotune.gpu import GPUS
from autotune.kernel import Case, Kernel, Stage
from autotune.kernels.rms_norm import RmsNorm
from autotune.registry import KERNELS, by_name, kernel
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import PRESETS, preset
from runtimes.errors import UsageError
from tests.autotune.checked import check_kernel

DTYPES = ("bfloat16", "int8", "int4")
STEPS = ((1, 1024), (4, 1000), (1, 1), (16, 300), (1, 131_072))
"""Batch and context."""
MODELS = [model_shapes(config) for config in PRESETS.values()]
GRID_LIMITS = (2**31 - 1, 65535, 65535)
every_kernel = pytest.mark.parametrize("each", KERNELS.values(), ids=KERNELS)


def cases_of(each: Kernel) -> list[Case]:
    found: dict[str, Case] = {}
    for model in MODELS:
        for stage in get_args(Stage):
            for dtype in DTYPES:
                for batch, context in STEPS:
                    for use in each.uses(model, stage, batch=batch, context=context, dtype=dtype):
                        found[str(use.case)] = use.case
    return list(found.values())


def test_a_name_belongs_to_one_kernel() -> None:
    assert all(each.name == name for name, each in KERNELS.items())
    with pytest.raises(ValueError, match="two kernels are named `rms_norm`: RmsNorm and RmsNorm"):
        by_name((*KERNELS.values(), RmsNorm()))


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert kernel("rms_norm") is KERNELS["rms_norm"]
    with pytest.raises(UsageError, match="no kernel is named `rms`") as caught:
        kernel("rms")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in KERNELS)


@every_kernel
def test_uses_are_cases_of_its_stages(each: Kernel) -> None:
    used: set[Stage] = set()
    for model in MODELS:
        for stage in get_args(Stage):
            for dtype in DTYPES:
                for use in each.uses(model, stage, batch=2, context=100, dtype=dtype):
                    used.add(stage)
                    assert use.name and use.count > 0, use
                    assert use.case.dtype in each.dtypes, use
                    assert all(type(value) is int for value in use.case.dims.values()), use
                    assert model.vision or stage != "vision", use
    assert used == set(each.stages)


@every_kernel
def test_defaults_fit_every_gpu_and_lie_in_the_space(each: Kernel) -> None:
    for case in cases_of(each):
        space = each.space(case)
        assert all(list(values) == sorted(set(values)) for values in space.constants.values()), case
        for gpu in GPUS.values():
            config = each.default(case, gpu)
            refused = each.refusal(case, config, gpu)
            assert refused is None, f"{case}, {config}, {gpu.name}: {refused}"
            assert config.constants.keys() == space.constants.keys(), f"{case}, {config}, {gpu.name}"
            outside = {name: value for name, value in config.constants.items() if value not in space.constants[name]}
            assert not outside, f"{case}, {config}, {gpu.name}: {outside}"
            assert config.num_warps in space.num_warps, f"{case}, {config}, {gpu.name}"
            assert config.num_stages in space.num_stages, f"{case}, {config}, {gpu.name}"


@every_kernel
def test_meta_tensors_give_launches(each: Kernel) -> None:
    """They hold no data, so nothing of it was read; all that the function takes is there, once."""
    for case in cases_of(each):
        config = each.default(case, GPUS["h100"])
        inputs, outputs = each.inputs(case, device="meta"), each.outputs(case, config, device="meta")
        assert not inputs.keys() & outputs.keys(), case
        assert any(not name.startswith("_") for name in outputs) or each.name == "cache_write", case
        launches = each.launches(case, config, inputs | outputs)
        assert launches, case
        for launch in launches:
            given = [*launch.arguments, *launch.constants]
            assert sorted(given) == sorted(launch.function.arg_names), f"{case}: {given}"
            tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
            assert tensors and all(tensor.is_meta for tensor in tensors), case
            assert all(1 <= size <= most for size, most in zip(launch.grid, GRID_LIMITS, strict=True)), (
                f"{case}: the grid {launch.grid}"
            )


@every_kernel
def test_buckets_are_stable(each: Kernel) -> None:
    """A record is found again whatever the order of the case's dims."""
    for case in cases_of(each):
        turned = dataclasses.replace(case, dims=dict(reversed(list(case.dims.items()))))
        bucket = each.bucket(case)
        assert bucket and bucket == each.bucket(turned) == each.bucket(case), case


@every_kernel
def test_costs_are_positive(each: Kernel) -> None:
    for case in cases_of(each):
        cost = each.cost(case)
        assert cost.bytes > 0 and cost.flops >= 0, case
        assert all(cost.floor_s(gpu) > 0 for gpu in GPUS.values()), case


@every_kernel
def test_its_sources_exist_and_name_its_own_module(each: Kernel) -> None:
    assert type(each).__module__ in each.source
    for case in cases_of(each)[:1]:
        config = each.default(case, GPUS["h100"])
        tensors = each.inputs(case, device="meta") | each.outputs(case, config, device="meta")
        launched = {launch.function.fn.__module__ for launch in each.launches(case, config, tensors)}
        assert launched <= set(each.source)
    assert all(find_spec(name) is not None for name in each.source)


@every_kernel
def test_the_toy_models_steps_hold_to_their_oracles(each: Kernel) -> None:
    nano = model_shapes(preset("nano"))
    for stage in each.stages:
        for use in each.uses(nano, stage, batch=2, context=7, dtype="int4" if "int4" in each.dtypes else "bfloat16"):
            check_kernel(each, use.case)


@every_kernel
def test_what_it_writes_in_place_is_what_its_oracle_gives(each: Kernel) -> None:
    nano = model_shapes(preset("nano"))
    for stage in each.stages:
        for use in each.uses(nano, stage, batch=2, context=7, dtype="bfloat16"):
            inputs = each.inputs(use.case, device="cpu")
            assert each.in_place(use.case) == each.oracle(use.case, inputs).keys() & inputs.keys(), use.case
