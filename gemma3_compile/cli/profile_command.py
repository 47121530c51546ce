"""``gemma3c profile``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_compile.cli.bars import Bars
from gemma3_compile.cli.choices import NearChoice
from gemma3_compile.cli.reports import require
from gemma3_compile.presets import PRESETS, preset
from runtimes.errors import HostError, UsageError

if TYPE_CHECKING:
    from autotune.kernel import Stage
    from autotune.profile import Profile, Row, StageProfile

DEFAULT_CONTEXT = 8192
_STAGE = NearChoice(["prefill", "decode", "vision"])
_DTYPE = NearChoice(
    ["bfloat16", "int8", "int4"],
    planned={name: f"the kernels run in bfloat16, not in {name}" for name in ("float16", "float32")},
)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("profile", short_help="Hold each kernel's time against the GPU's limit.")
@click.option("--size", type=NearChoice(PRESETS), default="12b", show_default=True, help="The model's size.")
@click.option("--stage", type=_STAGE, help="One stage only. [default: all that the model has]")
@click.option(
    "--context",
    type=click.IntRange(1),
    help=f"Tokens of a prefill, and before a token of decode. [default: {DEFAULT_CONTEXT}, or what the model takes]",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences, or pictures, at once.")
@click.option("--dtype", type=_DTYPE, default="bfloat16", show_default=True, help="Of the weights.")
@click.option("--gpu", "gpu_name", metavar="NAME", help="Measure nothing: print the floor of a GPU, such as h100.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write the profile as JSON; - prints it in the place of the table.",
)
@click.option("--html", "html_path", type=_FILE, metavar="FILE", help="Write a page with a roofline and the table.")
@click.option(
    "--trace", "trace_path", type=_FILE, metavar="FILE", help="Write a trace for chrome://tracing or Perfetto."
)
def command(
    size: str,
    stage: Stage | None,
    context: int | None,
    batch: int,
    dtype: str,
    gpu_name: str | None,
    json_path: Path | None,
    html_path: Path | None,
    trace_path: Path | None,
) -> None:
    """Measure what this GPU gives at most, then every kernel of a model's step, and print how far each is from it.

    \b
    gemma3c profile --size 12b                                  measure on this GPU
    gemma3c profile --size 4b --stage decode --html page.html   one stage, and a page with its roofline
    gemma3c profile --size 27b --gpu h100                       no GPU: the least that a step can take
    """
    context = _checked_context(size, context)
    for path in (json_path, html_path, trace_path):
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {path.absolute().parent}")

    require("tune", "torch", "triton")
    from autotune.profile_json import as_json
    from autotune.profile_page import as_page
    from autotune.profile_trace import as_trace

    profiled = make_profile(size, stage, context=context, batch=batch, dtype=dtype, gpu_name=gpu_name, bars=Bars())
    as_text = json.dumps(as_json(profiled), indent=1, ensure_ascii=False) + "\n"
    if json_path is not None and str(json_path) == "-":
        click.echo(as_text, nl=False)
    else:
        for line in profile_lines(profiled):
            click.echo(line)
        if json_path is not None:
            _write(json_path, as_text)
    if html_path is not None:
        _write(html_path, as_page(profiled))
    if trace_path is not None:
        _write(trace_path, json.dumps(as_trace(profiled), ensure_ascii=False) + "\n")
    for warning in profiled.warnings:
        click.echo(f"warning: {warning}", err=True)


def make_profile(
    size: str, stage: Stage | None, *, context: int, batch: int, dtype: str, gpu_name: str | None, bars: Bars
) -> Profile:
    """The profile of a named GPU by its datasheet, or of this host's by measuring.

    Raises:
        UsageError: an unknown GPU, or a stage that the model lacks.
        HostError: no GPU was named, and this host has none to measure on.
    """
    from autotune import gpu as gpus
    from autotune.profile import measured_us, profile, stages_of
    from autotune.record_store import RecordStore
    from autotune.registry import KERNELS
    from gemma3_compile.model_shapes import model_shapes

    model = model_shapes(preset(size))
    stages = stages_of(model, stage)
    run = partial(
        profile, list(KERNELS.values()), model, stages, batch=batch, context=context, dtype=dtype, store=RecordStore()
    )
    if gpu_name is not None:
        return run(gpu=gpus.named(gpu_name))
    try:
        gpu = gpus.present()
    except HostError as error:
        known = ", ".join(gpus.GPUS)
        raise HostError(error.message, hint=f"--gpu prints the floor of a GPU that is not here: {known}") from error
    from autotune.ahead_of_time import CompilerPool
    from autotune.ceilings import measure_ceilings

    bars.note(f"measuring what {gpu.name} gives at most")
    ceilings = measure_ceilings()
    with CompilerPool() as compiler:
        return run(gpu=gpu, ceilings=ceilings, measure=measured_us, compiler=compiler, progress=bars)


def profile_lines(profiled: Profile) -> Iterator[str]:
    """The profile for people: a table a stage, the largest loss first."""
    from autotune.profile_page import heading

    gpu = profiled.gpu
    source = "measured" if profiled.ceilings else "datasheet"
    yield f"Gemma 3 {profiled.model}, {profiled.dtype}, on {gpu.name}"
    yield f"{gpu.read_bytes_per_s / 1e12:.2f} TB/s read, {gpu.bf16_flops / 1e12:.0f} TFLOP/s in bf16 ({source})"
    for stage in profiled.stages:
        yield ""
        yield heading(stage)
        rows = stage.by_lost_time()
        measured = any(row.time_us is not None or row.failure for row in rows)
        lines = [_measured_row(stage, row) if measured else _floor_row(stage, row) for row in rows]
        yield from _aligned(_MEASURED if measured else _FLOOR, lines)
        yield from (f"{row.use.name} ({row.kernel}) failed: {row.failure}" for row in rows if row.failure)
        yield _sum(stage)


_MEASURED = ("where", "kernel", "calls", "µs", "floor µs", "of floor", "GB/s", "TFLOP/s", "share", "lost µs")
_FLOOR = ("where", "kernel", "calls", "floor µs", "step µs", "share", "MB", "GFLOP", "bound by")


def _measured_row(stage: StageProfile, row: Row) -> tuple[str, ...]:
    where = (row.use.name, row.kernel, str(row.use.count))
    if row.time_us is None or row.roofline is None:
        return (*where, "failed", f"{row.floor_us:.2f}", "", "", "", "", "")
    gb_s, tflop_s = row.rates()
    share = stage.share(row)
    return (
        *where,
        f"{row.time_us:.2f}",
        f"{row.floor_us:.2f}",
        f"{row.roofline:.0%}",
        f"{gb_s:.0f}",
        f"{tflop_s:.1f}",
        "" if share is None else f"{share:.1%}",
        f"{row.lost_us:.1f}",
    )


def _floor_row(stage: StageProfile, row: Row) -> tuple[str, ...]:
    share = stage.share(row) or 0.0
    return (
        row.use.name,
        row.kernel,
        str(row.use.count),
        f"{row.floor_us:.2f}",
        f"{row.step_floor_us:.1f}",
        f"{share:.1%}",
        f"{row.cost.bytes / 1e6:.2f}",
        f"{row.cost.flops / 1e9:.3f}",
        row.bound,
    )


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Texts to the left (the first two columns, and the last of the floor's table), figures to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if column < 2 or head[column] == "bound by" else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _sum(stage: StageProfile) -> str:
    floor = f"floor {stage.floor_us / 1e3:.3f} ms, {stage.rate_at_floor:,.1f} {stage.unit}/s"
    if stage.time_us is None:
        return floor
    rate = "" if stage.rate is None else f", {stage.rate:,.1f} {stage.unit}/s"
    partly = "" if stage.complete else f" without the {len(stage.rows) - len(stage.measured)} that failed"
    return f"kernels {stage.time_us / 1e3:.3f} ms{partly}{rate}; {floor}; {stage.roofline:.0%} of the floor reached"


def _checked_context(size: str, context: int | None) -> int:
    most = preset(size).text.max_context
    if context is not None and context > most:
        raise UsageError(f"--context {context} is more than the {most} tokens that {size} takes")
    return context or min(DEFAULT_CONTEXT, most)


def _write(path: Path, text: str) -> None:
    """Writes a file in one step, and says where."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    click.echo(f"wrote {path}", err=True)
