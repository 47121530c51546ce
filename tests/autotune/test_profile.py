"""The profile's arithmetic, against figures worked out by hand; what it does where a kernel fails; its trace."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from autotune import profile as profile_module
from autotune.ceilings import Ceilings, measure_ceilings
from autotune.gpu import GPUS, present
from autotune.kernel import Stage
from autotune.kernels.rms_norm import RmsNorm
from autotune.launch import Launch
from autotune.profile import LONGEST_CHUNK, StageProfile, measured_us, profile, stages_of
from autotune.profile_json import as_json
from autotune.profile_trace import as_trace
from autotune.record_store import RecordStore
from autotune.registry import KERNELS as REGISTRY
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from runtimes.errors import HostError, UsageError
from tests.autotune.profiles import CEILINGS, KERNELS, MODEL, Toy, made
from tests.autotune.test_records import record


def test_a_decode_step_against_its_floor(tmp_path: Path) -> None:
    (stage,) = made(tmp_path, "decode", kernels=(*KERNELS[:3], KERNELS[4])).stages
    floors = {row.use.name: row.floor_us for row in stage.rows}
    assert floors["gate & up <projection>"] == pytest.approx(236 / 3)  # 236 MB at 3 TB/s
    assert floors["local attention"] == pytest.approx(40)  # 30 GFLOP at 750 TFLOP/s; its 8 MB would take 2.67
    assert [row.bound for row in stage.rows] == ["memory", "memory", "compute", "memory"]
    floor = 48 * 236 / 3 + 48 * 118 / 3 + 40 * 40 + 96 / 3
    assert stage.floor_us == pytest.approx(floor)
    assert stage.time_us == pytest.approx(2 * floor + 96 / 3)  # the norms take three times their floor
    assert stage.lost_us == pytest.approx(floor + 96 / 3)
    assert stage.complete and stage.roofline == pytest.approx(floor / (2 * floor + 32))
    assert stage.rate == pytest.approx(1e6 / (2 * floor + 32)) and stage.rate_at_floor == pytest.approx(1e6 / floor)
    assert sum(stage.share(row) or 0 for row in stage.rows) == pytest.approx(1)


def test_figures_of_one_call(tmp_path: Path) -> None:
    row = made(tmp_path, "decode").stages[0].rows[0]
    assert row.rates() == pytest.approx((1500, 1e9 / (2 * 236e6 / 3e12) / 1e12))
    assert (row.roofline, row.lost_us) == pytest.approx((0.5, 48 * 236 / 3))
    assert row.intensity == pytest.approx(1e9 / 236e6)


def test_prefill_counts_the_chunks_tokens(tmp_path: Path) -> None:
    (stage,) = made(tmp_path, "prefill", kernels=KERNELS[:2]).stages
    assert stage.rows[0].cost.flops == 100e9
    assert stage.made == 1000 and stage.rate_at_floor == pytest.approx(1000 / stage.floor_us * 1e6)


def test_a_prefill_step_ends_with_the_head_over_one_row() -> None:
    model = model_shapes(preset("4b"))
    [head] = REGISTRY["matvec"].uses(model, "prefill", batch=2, context=8192, dtype="bfloat16")
    assert (head.name, head.count, head.case.dims["rows"], head.case.dims["columns"]) == ("head", 1, 2, 262208)


def test_the_largest_loss_comes_first_and_failures_last(tmp_path: Path) -> None:
    (stage,) = made(tmp_path, "decode").stages
    rows = stage.by_lost_time()
    assert [row.lost_us for row in rows[:4]] == sorted((row.lost_us or 0 for row in rows[:4]), reverse=True)
    assert (rows[4].use.name, rows[4].time_us, rows[4].failure) == ("global attention", None, "out of memory")


def test_a_failure_leaves_the_others_figures(tmp_path: Path) -> None:
    (stage,) = made(tmp_path, "decode").stages
    assert not stage.complete and stage.rate is None
    assert stage.time_us == pytest.approx(2 * (48 * 236 / 3 + 48 * 118 / 3 + 40 * 40) + 96)
    assert stage.roofline == pytest.approx(0.5, abs=0.005)
    assert stage.floor_us == pytest.approx(48 * 236 / 3 + 48 * 118 / 3 + 40 * 40 + 8 * 80 + 32)


def test_without_a_measurement_the_floor_stands_alone(tmp_path: Path) -> None:
    made_up = made(tmp_path, "decode", measure=None)
    (stage,) = made_up.stages
    assert (stage.time_us, stage.rate, stage.lost_us, stage.roofline) == (None, None, None, None)
    assert made_up.gpu == GPUS["h100"] and made_up.ceilings is None
    assert made_up.warnings == ()  # what is not tuned does not matter to a floor
    assert sum(stage.share(row) or 0 for row in stage.rows) == pytest.approx(1)
    assert [row.step_floor_us for row in stage.by_lost_time()] == sorted(
        (row.step_floor_us for row in stage.rows), reverse=True
    )


def test_measured_rates_take_the_datasheets_place(tmp_path: Path) -> None:
    made_up = made(tmp_path, "decode")
    assert (made_up.gpu.read_bytes_per_s, made_up.gpu.bf16_flops) == (3e12, 750e12)
    assert made_up.gpu.name == GPUS["h100"].name


def test_records_are_run_and_what_is_missing_is_said_once(tmp_path: Path) -> None:
    tried = []
    store = RecordStore(tmp_path / "mine", shipped_folder=tmp_path)
    tuned = dataclasses.replace(KERNELS[0].default(KERNELS[0].uses(MODEL, "decode", batch=1, context=1, dtype="bfloat16")[0].case, GPUS["h100"]), constants={"BLOCK": 2})  # fmt: skip
    store.put(record(kernel="matvec", bucket="all", config=tuned), GPUS["h100"])
    made_up = profile(
        KERNELS,
        MODEL,
        ["decode"],
        batch=1,
        context=1000,
        dtype="bfloat16",
        gpu=GPUS["h100"],
        store=store,
        ceilings=CEILINGS,
        measure=lambda kernel, case, config: tried.append((kernel.name, config.constants["BLOCK"])) or 1.0,
    )
    assert tried == [("matvec", 2), ("matvec", 2), ("attention", 1), ("attention", 1), ("rms_norm", 1)]
    stale, heuristic = made_up.warnings
    assert stale.startswith("matvec was tuned with other sources")
    assert heuristic.startswith("some shapes have no tuning record for NVIDIA H100 80GB HBM3")


def test_stages_are_those_that_the_model_has() -> None:
    text_only = dataclasses.replace(MODEL, vision=None)
    assert stages_of(MODEL, None) == ("prefill", "decode", "vision")
    assert stages_of(text_only, None) == ("prefill", "decode")
    assert stages_of(MODEL, "decode") == ("decode",)
    with pytest.raises(UsageError, match="12b is for text only, so there is no stage `vision`"):
        stages_of(text_only, "vision")


def test_a_stage_without_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no kernel has work in vision of 12b at bfloat16"):
        made(tmp_path, "vision")


def test_json_says_what_the_rows_say(tmp_path: Path) -> None:
    made_up = made(tmp_path, "decode")
    value = json.loads(json.dumps(as_json(made_up), allow_nan=False))
    (stage,) = value["stages"]
    assert value["gpu"]["rates"] == {"read": "a reduction", "product": "a product"}
    assert (stage["stage"], stage["complete"], stage["tokens_per_s"]) == ("decode", False, None)
    assert [row["name"] for row in stage["rows"]] == [row.use.name for row in made_up.stages[0].by_lost_time()]
    first = stage["rows"][0]
    assert first["gb_per_s"] == pytest.approx(1500) and first["bound"] == "memory"
    assert first["config"] == {"constants": {"BLOCK": 1}, "num_warps": 4, "num_stages": 1, "from": "heuristic", "tuned_here": False}  # fmt: skip
    assert stage["rows"][-1]["failure"] == "out of memory"
    floor = as_json(made(tmp_path, "decode", measure=None))
    assert floor["gpu"]["rates"] == "datasheet" and floor["stages"][0]["rows"][0]["gb_per_s"] is None


def test_the_trace_lays_the_step_out_end_to_end(tmp_path: Path) -> None:
    made_up = made(tmp_path, "prefill", "decode", kernels=KERNELS[:3])
    events = json.loads(json.dumps(as_trace(made_up), allow_nan=False))["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"12b prefill, bfloat16", "12b decode, bfloat16", "measured", "floor"}
    for process, stage in enumerate(made_up.stages, start=1):
        for thread, total in ((1, stage.time_us), (2, stage.floor_us)):
            slices = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (process, thread)]
            assert len(slices) == 3
            at = 0.0
            for event in slices:
                assert event["ts"] == pytest.approx(at)
                at += event["dur"]
            assert at == pytest.approx(total)


def test_the_trace_of_a_floor_has_no_measured_thread(tmp_path: Path) -> None:
    events = as_trace(made(tmp_path, "decode", measure=None))["traceEvents"]
    assert {event["tid"] for event in events} == {0, 2}


def test_a_kernel_that_lacks_the_stage_is_not_asked(tmp_path: Path) -> None:
    class DecodeOnly(Toy):
        stages = ("decode",)

    only = DecodeOnly("sample", "sampling", 1, 1, 0)
    (stage,) = made(tmp_path, "prefill", kernels=(*KERNELS, only)).stages
    assert "sampling" not in {row.use.name for row in stage.rows}


def test_a_long_prompt_is_profiled_by_one_chunk(tmp_path: Path) -> None:
    def stage_of(stage: Stage, context: int) -> StageProfile:
        options = {"batch": 2, "context": context, "dtype": "bfloat16", "gpu": GPUS["h100"]}
        store = RecordStore(tmp_path / "mine", shipped_folder=tmp_path)
        return profile(KERNELS, MODEL, [stage], **options, store=store).stages[0]  # type: ignore[arg-type]

    assert stage_of("prefill", 131072).context == LONGEST_CHUNK
    assert stage_of("prefill", 131072).rows[0].cost.flops == 2 * 819e9
    assert stage_of("decode", 131072).context == 131072


def test_kernels_are_compiled_together_before_any_is_measured(tmp_path: Path) -> None:
    order: list[str] = []

    class Compiler:
        def compile_all(self, launches: list[tuple[Launch, int]]) -> None:
            order.extend(f"{launch.function.__name__} for {architecture}" for launch, architecture in launches)

    profile(
        [RmsNorm()],
        MODEL,
        ["decode"],
        batch=1,
        context=1000,
        dtype="bfloat16",
        gpu=GPUS["h100"],
        store=RecordStore(tmp_path / "mine", shipped_folder=tmp_path),
        measure=lambda kernel, case, config: order.append("measured") or 1.0,
        compiler=Compiler(),  # type: ignore[arg-type]
    )
    assert order == ["_rms_norm_kernel for 90"] * 2 + ["measured"] * 2  # with and without a residual


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "the GPU's memory does not suffice"),
        (OutOfResources(300000, 232448, "shared memory"), "OutOfResources: out of resource: shared memory"),
        (
            RuntimeError("CUDA error: an illegal memory access\nCompile with"),
            "RuntimeError: CUDA error: an illegal memory access",
        ),
    ],
)
def test_what_fails_on_the_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fails(*arguments: object) -> float:
        raise error

    monkeypatch.setattr(profile_module, "kernel_us", fails)
    case = KERNELS[0].uses(MODEL, "decode", batch=1, context=1, dtype="bfloat16")[0].case
    with pytest.raises(HostError, match=message) as caught:
        measured_us(KERNELS[0], case, KERNELS[0].default(case, GPUS["h100"]))
    assert "\n" not in caught.value.message


@pytest.mark.gpu
def test_ceilings_are_between_half_and_all_of_the_datasheet() -> None:
    gpu = present()
    measured: Ceilings = measure_ceilings()
    assert 0.5 < measured.read_bytes_per_s / gpu.read_bytes_per_s < 1.02
    assert 0.5 < measured.bf16_flops / gpu.bf16_flops < 1.02
