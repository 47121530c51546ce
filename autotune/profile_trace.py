"""A profile as a Chrome trace, which chrome://tracing and https://ui.perfetto.dev open.

A stage is a process with two threads: the step as it was measured, and its floor. A slice is a use with all its calls, not
a single one: what the profile knows is how long each takes, not when it runs.

Source: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

from typing import Any

from autotune.profile import Profile, Row, StageProfile

_MEASURED, _FLOOR = 1, 2


def as_trace(profiled: Profile) -> dict[str, Any]:
    """The trace's JSON value. Times are in microseconds, as the format wants them."""
    events: list[dict[str, Any]] = []
    for process, stage in enumerate(profiled.stages, start=1):
        events.append(_name("process_name", process, 0, f"{profiled.model} {stage.stage}, {profiled.dtype}"))
        if any(row.time_us is not None for row in stage.rows):
            events.append(_name("thread_name", process, _MEASURED, "measured"))
        events.append(_name("thread_name", process, _FLOOR, "floor"))
        events += _slices(process, stage)
    return {
        "displayTimeUnit": "ms",
        "otherData": {"gpu": profiled.gpu.name, "model": profiled.model, "when": profiled.when},
        "traceEvents": events,
    }


def _slices(process: int, stage: StageProfile) -> list[dict[str, Any]]:
    events = []
    ends = {_MEASURED: 0.0, _FLOOR: 0.0}
    for row in stage.rows:
        for thread, duration in ((_MEASURED, row.step_time_us), (_FLOOR, row.step_floor_us)):
            if duration is None:
                continue
            events.append(
                {
                    "ph": "X",
                    "name": row.use.name,
                    "cat": row.kernel,
                    "pid": process,
                    "tid": thread,
                    "ts": ends[thread],
                    "dur": duration,
                    "args": _facts(row),
                }
            )
            ends[thread] += duration
    return events


def _facts(row: Row) -> dict[str, Any]:
    gb_s, tflop_s = row.rates()
    return {
        "kernel": row.kernel,
        "case": str(row.use.case),
        "calls": row.use.count,
        "us a call": row.time_us,
        "floor us a call": row.floor_us,
        "share of the floor reached": row.roofline,
        "GB/s": gb_s,
        "TFLOP/s": tflop_s,
        "configuration": str(row.choice.config),
    }


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
