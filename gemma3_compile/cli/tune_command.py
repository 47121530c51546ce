"""``gemma3c tune``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from gemma3_compile.cli.bars import Bars
from gemma3_compile.cli.choices import NearChoice
from gemma3_compile.cli.reports import require
from gemma3_compile.presets import PRESETS, preset
from runtimes.errors import HostError, UsageError

if TYPE_CHECKING:
    from autotune.gpu import Gpu
    from autotune.sampler import Kind
    from autotune.study import Problem
    from autotune.tuning import Tuned

DEFAULT_CONTEXTS = (1024, 8192, 32768)
DEFAULT_SIZES = tuple(size for size in PRESETS if size != "nano")
DTYPES = ("bfloat16", "int8", "int4")
MOST_AT_ONCE, MOST_AHEAD = 4, 3
"""Studies side by side, and trials of each that are in hand: enough for 16 cores. More trials of one study would
make TPE draw without knowing how the last ones did."""
_MODES = ("export_path", "import_path")
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("tune", short_help="Find each kernel's fastest configuration on this GPU.")
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="This kernel only; many times. [default: all]")
@click.option("--size", "sizes", type=NearChoice(PRESETS), multiple=True, help="For this model; many times. [default: 270m to 27b]")  # fmt: skip
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(1),
    multiple=True,
    help="Tokens before a token of decode, and of a prefill chunk (up to 8192); many times. "
    f"[default: {', '.join(map(str, DEFAULT_CONTEXTS))}]",
)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Sequences, or pictures, at once; many times. [default: 1]")  # fmt: skip
@click.option("--dtype", "dtypes", type=NearChoice(DTYPES), multiple=True, help="Of the weights; many times. [default: all]")  # fmt: skip
@click.option(
    "--trials",
    type=click.IntRange(1),
    help="Of each study. [default: a quarter of its candidates, 30 to 120; all for grid]",
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), metavar="S", help="Seconds for all studies together."
)
@click.option(
    "--candidate-timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    default=60.0,
    show_default=True,
    help="Seconds that one candidate may take to compile, and again to be checked and timed.",
)
@click.option(
    "--storage",
    metavar="URL",
    envvar="GEMMA3C_STORAGE",
    show_envvar=True,
    help="Where studies are kept, and where other workers join them: sqlite, journal, postgresql, mysql or grpc. "
    "[default: SQLite in the cache folder]",
)
@click.option("--sampler", type=NearChoice(["tpe", "grid", "random"]), default="tpe", show_default=True, help="How candidates are chosen.")  # fmt: skip
@click.option("--export", "export_path", type=_FILE, metavar="FILE", help="Tune nothing: write your records to a file.")
@click.option("--import", "import_path", type=_FILE, metavar="FILE", help="Tune nothing: take records from a file.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    kernels: tuple[str, ...],
    sizes: tuple[str, ...],
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    trials: int | None,
    timeout: float | None,
    candidate_timeout: float,
    storage: str | None,
    sampler: Kind,
    export_path: Path | None,
    import_path: Path | None,
    as_json: bool,
) -> None:
    """Find each kernel's fastest configuration on this GPU, and keep it in your records.

    A study is kept in the storage: the same command resumes it, and workers on other machines join it. Needs the extra tune.

    \b
    gemma3c tune --size 4b                                  every kernel of one model
    gemma3c tune --size 4b --kernel matvec --dtype int4     one kernel
    gemma3c tune --export records.json                      to take along to another machine
    """
    require("tune", "torch", "triton", "optuna")
    if export_path is not None or import_path is not None:
        _check_alone(ctx)
        _move(export_path, import_path)
        return

    from autotune import gpu, registry

    chosen = [registry.kernel(name) for name in kernels] or list(registry.KERNELS.values())
    from autotune.tuning import problems
    from gemma3_compile.model_shapes import model_shapes

    found = problems(
        chosen,
        [(model_shapes(preset(size)), contexts_of(size, contexts)) for size in sizes or DEFAULT_SIZES],
        rated(gpu.present()),
        batches=batches or (1,),
        dtypes=dtypes or DTYPES,
    )
    results = run_studies(
        found,
        storage,
        sampler=sampler,
        trials=trials,
        timeout_s=timeout,
        candidate_timeout_s=candidate_timeout,
        report=lambda tuned: None if as_json else click.echo(str(tuned)),
    )
    if as_json:
        click.echo(json.dumps([as_json_of(tuned) for tuned in results], indent=1, ensure_ascii=False))
    ctx.exit(0 if all(tuned.record is not None for tuned in results) else 1)


def rated(gpu: Gpu) -> Gpu:
    """``gpu`` with its rates measured, so that records hold a share of what it really gives; its datasheet's if it is too full."""
    from autotune import ceilings

    try:
        return ceilings.measure_ceilings().of(gpu)
    except HostError as error:
        Bars().note(f"{error.message}: the datasheet's rates stand")
        return gpu


def contexts_of(size: str, contexts: Sequence[int]) -> tuple[int, ...]:
    """The contexts that a model takes.

    Raises:
        UsageError: one of those that were asked for is too long.
    """
    most = preset(size).text.max_context
    if too_long := [context for context in contexts if context > most]:
        raise UsageError(f"--context {too_long[0]} is more than the {most} tokens that {size} takes")
    return tuple(contexts) or tuple(context for context in DEFAULT_CONTEXTS if context <= most) or (most,)


def run_studies(
    problems: Sequence[Problem],
    storage_url: str | None,
    *,
    sampler: Kind,
    trials: int | None,
    timeout_s: float | None,
    candidate_timeout_s: float,
    report: Callable[[Tuned], None],
) -> list[Tuned]:
    """Runs the studies on this host's GPU; ``report`` hears of each when its record is written."""
    import optuna

    from autotune.ahead_of_time import CompilerPool
    from autotune.record_store import RecordStore
    from autotune.storage import open_storage
    from autotune.study import Effort
    from autotune.trial_process import TrialProcess
    from autotune.tuning import Tuner

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # errors end here, and are told in two lines
    bars = Bars()
    store = RecordStore()
    gpu = problems[0].gpu
    store.check_writable(gpu)
    storage = open_storage(storage_url)
    studies = "1 study" if len(problems) == 1 else f"{len(problems)} studies"
    bars.note(f"{studies} on {gpu.name}, kept in {storage.place}; records go to {store.folder}")
    results = []
    with (
        CompilerPool(timeout_s=candidate_timeout_s) as compiler,
        TrialProcess(limit_s=candidate_timeout_s) as evaluator,
    ):
        evaluator.start()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        effort = Effort(sampler=sampler, trials=trials, deadline=deadline, ahead=ahead())
        tuner = Tuner(storage, store, evaluator, effort, at_once=at_once(), compiler=compiler, progress=bars)
        for tuned in tuner.tune(problems):
            report(tuned)
            results.append(tuned)
    return results


def as_json_of(tuned: Tuned) -> dict[str, object]:
    """What came of one study, for a program."""
    from autotune.record_file import GpuModel, as_json

    model, record = GpuModel.of(tuned.problem.gpu), tuned.record
    done, planned = tuned.trials
    return {
        "kernel": tuned.problem.kernel.name,
        "gpu": model.name,
        "bucket": tuned.problem.bucket,
        "trials": done,
        "planned": planned,
        "ended_early": tuned.why,
        "heuristic_us": tuned.heuristic_us,
        "record": None if record is None else as_json(model, {record.key: record})["records"][0],
    }


def at_once() -> int:
    """How many studies this host runs side by side."""
    return max(1, min(MOST_AT_ONCE, len(os.sched_getaffinity(0)) // 4))


def ahead() -> int:
    """How many trials of a study are in hand: one is timed, the others are compiled."""
    return max(2, min(MOST_AHEAD, len(os.sched_getaffinity(0)) // 4))


def _check_alone(ctx: click.Context) -> None:
    """Moving records is not tuning: an option of the other would be ignored."""
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name not in _MODES and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{parameter.opts[0]} says how to tune, but --export and --import only move records")


def _move(export_path: Path | None, import_path: Path | None) -> None:
    from autotune.record_store import RecordStore

    store = RecordStore()
    if import_path is not None:
        done = store.import_(import_path)
        click.echo(
            f"{done.added} records added, {done.replaced} replaced by faster ones, {done.kept} kept in {store.folder}"
        )
    if export_path is not None:
        click.echo(f"{store.export(export_path)} records written to {export_path}")
