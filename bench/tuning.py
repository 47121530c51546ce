"""How soon a study finds the fastest configuration, and what tuning gains over the heuristics.

On a GPU every candidate of four kernels is timed once, in a part of the space that is small enough for that; the times go
into a table. Studies are then replayed over the table, by the code that ``gemma3c tune`` runs: how many trials pass until
one is within 3% of the table's best?

    python -m bench.tuning --table tuning.json --enumerate     on the GPU, about two minutes
    python -m bench.tuning --table tuning.json                 anywhere
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import InMemoryStorage

from autotune.ahead_of_time import Compiled, CompileError, CompilerPool
from autotune.candidates import Candidates, Key, Params, config_of, params_of
from autotune.gpu import GPUS, Gpu, present
from autotune.kernel import Case, Config, Kernel, Space, Stage
from autotune.record_store import triton_version
from autotune.registry import KERNELS
from autotune.sampler import Kind
from autotune.storage import Secrets, Storage
from autotune.study import Effort, Problem, Study
from autotune.trial_process import TrialProcess
from autotune.trial_worker import Failed, GoOn, Measured, Outcome, Stopped, Unfit
from autotune.tuning import driver_version
from bench.record import BAR, Row, finish, less_is_better, options
from gemma3_compile.cli.tune_command import MOST_AHEAD
from gemma3_compile.model_shapes import model_shapes
from gemma3_compile.presets import preset
from runtimes.errors import UsageError

CHOSEN: tuple[tuple[str, str, Stage, int, str], ...] = (
    ("matvec", "12b", "decode", 1024, "down"),
    ("matmul", "4b", "prefill", 2048, "gate and up"),
    ("window_decode", "12b", "decode", 8192, "local attention"),
    ("window_prefill", "12b", "prefill", 2048, "local attention"),
)
"""Kernel, model, stage, context, and where in the step."""
LIMIT = 160
"""Candidates of each kernel at most."""
NEAR, BAR_PERCENT, SEEDS = 1.03, 20.0, 5
SLOW = 1.25
"""A candidate slower than the best by this much is timed by its first replays only."""
FINAL_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Table:
    """All times of one kernel. ``times_us`` is None where a candidate does not run; ``final_us`` is of a last round, one right after
    the other: the best, and the heuristic."""

    kernel: str
    case: Case
    space: Space
    default: Config
    times_us: Mapping[Key, float | None]
    final_us: tuple[float, float]

    @property
    def best_us(self) -> float:
        return min(time_us for time_us in self.times_us.values() if time_us is not None)


# --- on the GPU ---


def limited(kernel: Kernel, case: Case, gpu: Gpu, limit: int) -> Space:
    """The part of a space around its heuristic: every parameter in turn gets one more value, as long as ``limit`` holds."""
    space = kernel.space(case)
    values = {**space.constants, "num_warps": space.num_warps, "num_stages": space.num_stages}
    start = params_of(kernel.default(case, gpu))
    by_nearness = {name: _from(start[name], found) for name, found in values.items()}
    taken = dict.fromkeys(values, 1)
    open_names = [name for name in values if len(values[name]) > 1]
    while open_names:
        name = open_names.pop(0)
        taken[name] += 1
        if _size(kernel, case, gpu, _space(by_nearness, taken)) > limit:
            taken[name] -= 1  # and never again
        elif taken[name] < len(values[name]):
            open_names.append(name)
    return _space(by_nearness, taken)


def _from(start: int, values: Sequence[int]) -> list[int]:
    return sorted(values, key=lambda value: abs(value - start))


def _space(by_nearness: Mapping[str, Sequence[int]], taken: Mapping[str, int]) -> Space:
    values = {name: tuple(sorted(found[: taken[name]])) for name, found in by_nearness.items()}
    warps, stages = values.pop("num_warps"), values.pop("num_stages")
    return Space(constants=values, num_warps=warps, num_stages=stages)


def _size(kernel: Kernel, case: Case, gpu: Gpu, space: Space) -> int:
    """Candidates that fit; 0 where none does."""
    try:
        return len(Candidates.of(kernel, case, gpu, space).fitting)
    except UsageError:
        return 0


def enumerate_all(gpu: Gpu, limit: int) -> Iterator[Table]:
    """Times every candidate of one kernel after another; compiles all of them at once on all cores."""
    chosen = []
    with CompilerPool(timeout_s=60) as compiler, TrialProcess(limit_s=30) as evaluator:
        for name, size, stage, context, where in CHOSEN:
            kernel, model = KERNELS[name], model_shapes(preset(size))
            uses = kernel.uses(model, stage, batch=1, context=context, dtype="bfloat16")
            case = next(use.case for use in uses if use.name == where)
            problem = Problem(kernel=kernel, case=case, gpu=gpu)
            space = limited(problem.kernel, problem.case, gpu, limit)
            candidates = Candidates.of(problem.kernel, problem.case, gpu, space)
            futures = {key: _submit(compiler, problem, config_of(candidates.params(key))) for key in candidates.fitting}
            chosen.append((problem, space, candidates, futures))
        for problem, space, candidates, futures in chosen:
            table = _timed(problem, space, candidates, futures, evaluator)
            if table is not None:
                yield table


def _submit(compiler: CompilerPool, problem: Problem, config: Config) -> list[Future[Compiled]]:
    kernel, case = problem.kernel, problem.case
    tensors = kernel.inputs(case, device="meta") | kernel.outputs(case, config, device="meta")
    return [compiler.submit(launch, problem.gpu.architecture) for launch in kernel.launches(case, config, tensors)]


def _timed(
    problem: Problem,
    space: Space,
    candidates: Candidates,
    futures: Mapping[Key, Sequence[Future[Compiled]]],
    evaluator: TrialProcess,
) -> Table | None:
    """None where no candidate runs."""
    began = time.monotonic()
    times: dict[Key, float | None] = {}
    for key, compiled in futures.items():
        best = min((time_us for time_us in times.values() if time_us is not None), default=float("inf"))
        times[key] = _time_of(problem, config_of(candidates.params(key)), compiled, evaluator, best)
    ran = {key: time_us for key, time_us in times.items() if time_us is not None}
    if not ran:
        print(f"{problem}: none of {len(times)} candidates runs", flush=True)
        return None
    winner = config_of(candidates.params(min(ran, key=lambda key: ran[key])))
    default = problem.kernel.default(problem.case, problem.gpu)
    rounds = [[_once(problem, config, evaluator) for config in (winner, default)] for _ in range(FINAL_ROUNDS)]
    final = tuple(statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"{problem}: {len(ran)} of {len(times)} candidates run, {final[0]:.2f} µs, heuristic {final[1]:.2f} µs, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return Table(
        kernel=problem.kernel.name,
        case=problem.case,
        space=space,
        default=default,
        times_us=times,
        final_us=(final[0], final[1]),
    )


def _time_of(
    problem: Problem, config: Config, compiled: Sequence[Future[Compiled]], evaluator: TrialProcess, best: float
) -> float | None:
    try:
        if any(future.result().shared_bytes > problem.gpu.shared_bytes for future in compiled):
            return None
    except CompileError:
        return None
    last = 0.0

    def go_on(repeats: int, median_us: float) -> bool:
        nonlocal last
        last = median_us
        return median_us < SLOW * best

    outcome = evaluator.evaluate(problem.kernel, problem.case, config, go_on)
    match outcome:
        case Measured():
            return outcome.time_us
        case Stopped():
            return last
        case Failed():
            print(f"{problem}: {config} failed: {outcome.reason}")
    return None


def _once(problem: Problem, config: Config, evaluator: TrialProcess) -> float:
    outcome = evaluator.evaluate(problem.kernel, problem.case, config, lambda repeats, median_us: True)
    return outcome.time_us if isinstance(outcome, Measured) else float("nan")


# --- the table as a file ---


def save(path: Path, gpu: Gpu, tables: Sequence[Table]) -> None:
    content = {
        "gpu": asdict(gpu),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "triton": triton_version(),
        "driver": driver_version(),
        "tables": [
            {
                "kernel": table.kernel,
                "case": {"dtype": table.case.dtype, "dims": dict(table.case.dims)},
                "space": asdict(table.space) | {"constants": dict(table.space.constants)},
                "default": params_of(table.default),
                "times_us": [[list(key), time_us] for key, time_us in table.times_us.items()],
                "final_us": table.final_us,
            }
            for table in tables
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")


def load(path: Path) -> tuple[Gpu, str, list[Table]]:
    """The GPU, when and with what it was measured, and the tables."""
    content = json.loads(path.read_text())
    gpu = Gpu(**content["gpu"] | {"compute_capability": tuple(content["gpu"]["compute_capability"])})
    made = f"times from {gpu.name}, {content['when']}, driver {content['driver']}, Triton {content['triton']}"
    return gpu, made, [_table(item) for item in content["tables"]]


def _table(item: Mapping[str, Any]) -> Table:
    space = item["space"]
    constants = {name: tuple(values) for name, values in space["constants"].items()}
    return Table(
        kernel=item["kernel"],
        case=Case(**item["case"]),
        space=Space(constants=constants, num_warps=tuple(space["num_warps"]), num_stages=tuple(space["num_stages"])),
        default=config_of(item["default"]),
        times_us={tuple(key): time_us for key, time_us in item["times_us"]},
        final_us=(item["final_us"][0], item["final_us"][1]),
    )


# --- replays ---


class Replay:
    """An evaluator that looks times up, and notes the order in which it was asked."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.asked: list[float | None] = []

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        params: Params = params_of(config)
        names = (*self.table.space.constants, "num_warps", "num_stages")
        time_us = self.table.times_us[tuple(params[name] for name in names)]
        self.asked.append(time_us)
        if time_us is None:
            return Unfit(reason="noted in the table")
        return Measured(time_us=time_us) if go_on(3, time_us) else Stopped()


def trials_until_near(table: Table, gpu: Gpu, kind: Kind, seed: int) -> int:
    """How many trials pass until one is within 3% of the best; the whole space where none of half of it is."""
    replay = Replay(table)
    storage = Storage(optuna=InMemoryStorage(), place="memory", secrets=Secrets(()), beats=False)
    problem = Problem(kernel=KERNELS[table.kernel], case=table.case, gpu=gpu)
    effort = Effort(sampler=kind, trials=len(table.times_us) // 2, seed=seed, ahead=MOST_AHEAD)
    Study(problem, storage, replay, effort, starts=[table.default], space=table.space).run()
    near = (at for at, time_us in enumerate(replay.asked, 1) if time_us is not None and time_us <= NEAR * table.best_us)
    return next(near, len(table.times_us))


def rows_of(table: Table, gpu: Gpu, made: str, seeds: int) -> list[Row]:
    size = len(table.times_us)

    def share(kind: Kind) -> float:
        counts = [trials_until_near(table, gpu, kind, seed) for seed in range(seeds)]
        return 100 * statistics.median(counts) / size

    tpe, chance = share("tpe"), share("random")
    near = sum(time_us is not None and time_us <= NEAR * table.best_us for time_us in table.times_us.values())
    name = f"{table.kernel}, {table.case}"
    note = (
        f"{size} candidates, {near} of them within 3% of the best; median of {seeds} seeds, from the heuristic; {made}"
    )
    tuned_us, heuristic_us = table.final_us
    metric = "trials until within 3% of the best"
    return [
        less_is_better(name, metric, "% of the space", tpe, BAR, BAR_PERCENT, note),
        less_is_better(name, metric, "% of the space", tpe, "random search", chance, note),
        less_is_better(name, "time", "µs", tuned_us, "heuristic default", heuristic_us, made),
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--table", type=Path, required=True, help="where the times are, or go")
    parser.add_argument("--enumerate", action="store_true", help="only time all candidates on this host's GPU")
    parser.add_argument("--limit", type=int, default=LIMIT, help="candidates of each kernel at most")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if given.enumerate or not given.table.exists():
        gpu = present()
        timed: list[Table] = []
        for table in enumerate_all(gpu, 12 if given.quick else given.limit):
            timed.append(table)
            save(given.table, gpu, timed)  # what is timed stays, whatever the next kernel does
    if given.enumerate:
        return
    gpu, made, tables = load(given.table)
    rows = [row for table in tables for row in rows_of(table, gpu, made, 1 if given.quick else SEEDS)]
    short = next((short for short, known in GPUS.items() if known.name == gpu.name), gpu.name.lower().replace(" ", "-"))
    finish(f"tuning-{short}", rows, quick=given.quick)


if __name__ == "__main__":
    main()
