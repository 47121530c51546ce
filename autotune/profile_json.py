"""A profile as JSON; docs/profiling.md says what each field is."""

from __future__ import annotations

from typing import Any

from autotune.profile import Profile, Row, StageProfile

FORMAT_VERSION = 1


def as_json(profiled: Profile) -> dict[str, Any]:
    """A profile for programs; times in microseconds, rates in units a second."""
    gpu, ceilings = profiled.gpu, profiled.ceilings
    return {
        "format": "gemma3c profile",
        "version": FORMAT_VERSION,
        "model": profiled.model,
        "dtype": profiled.dtype,
        "when": profiled.when,
        "gpu": {
            "name": gpu.name,
            "compute_capability": list(gpu.compute_capability),
            "multiprocessors": gpu.multiprocessors,
            "read_bytes_per_s": gpu.read_bytes_per_s,
            "bf16_flops": gpu.bf16_flops,
            "rates": {"read": ceilings.read_by, "product": ceilings.product_by} if ceilings else "datasheet",
        },
        "warnings": list(profiled.warnings),
        "stages": [_stage_json(stage) for stage in profiled.stages],
    }


def _stage_json(stage: StageProfile) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "batch": stage.batch,
        "context": stage.context,
        "floor_us": stage.floor_us,
        "time_us": stage.time_us,
        "complete": stage.complete,
        "roofline": stage.roofline,
        f"{stage.unit}_per_s_at_floor": stage.rate_at_floor,
        f"{stage.unit}_per_s": stage.rate,
        "rows": [_row_json(stage, row) for row in stage.by_lost_time()],
    }


def _row_json(stage: StageProfile, row: Row) -> dict[str, Any]:
    config = row.choice.config
    gb_s, tflop_s = row.rates()
    measured = row.time_us is not None
    return {
        "name": row.use.name,
        "kernel": row.kernel,
        "case": {"dtype": row.use.case.dtype, "dims": dict(row.use.case.dims)},
        "count": row.use.count,
        "config": {
            "constants": dict(config.constants),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "from": row.choice.origin,
            "tuned_here": row.choice.tuned_here,
        },
        "bytes": row.cost.bytes,
        "flops": row.cost.flops,
        "floor_us": row.floor_us,
        "bound": row.bound,
        "time_us": row.time_us,
        "gb_per_s": gb_s if measured else None,
        "tflop_per_s": tflop_s if measured else None,
        "roofline": row.roofline,
        "share": stage.share(row),
        "lost_us": row.lost_us,
        "failure": row.failure,
    }
