"""The bench of the studies, over made-up times: what is timed, what the file keeps, and how a replay counts."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from autotune.ahead_of_time import Compiled, CompileError
from autotune.candidates import Candidates, Key, params_of
from autotune.gpu import GPUS
from autotune.kernel import Case, Config, Kernel
from autotune.launch import Launch
from autotune.registry import KERNELS
from autotune.trial_worker import Failed, GoOn, Measured, Outcome, Stopped
from bench import tuning
from bench.tuning import CHOSEN, Table, enumerate_all, limited, load, rows_of, save, trials_until_near
from tests.autotune.test_study import cubin

H100 = GPUS["h100"]


class Pool:
    """Compiles nothing; what has one warp does not compile."""

    def __init__(self, **options: object) -> None:
        pass

    def submit(self, launch: Launch, architecture: int) -> Future[Compiled]:
        future: Future[Compiled] = Future()
        if launch.num_warps == 1:
            future.set_exception(CompileError("Triton does not compile it"))
        else:
            future.set_result(cubin(0))
        return future

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class Evaluator(Pool):
    """The heuristic takes 100 µs, and every parameter that differs from it 20 µs more. ``window_decode`` is wrong."""

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        if kernel.name == "window_decode":
            return Failed(reason="a wrong result")
        heuristic = params_of(kernel.default(case, H100))
        time_us = 100.0 + 20 * sum(value != heuristic[name] for name, value in params_of(config).items())
        return Measured(time_us=time_us) if go_on(3, time_us) else Stopped()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CompilerPool", Pool)
    monkeypatch.setattr(tuning, "TrialProcess", Evaluator)


def test_all_candidates_are_timed_and_the_file_gives_them_back(no_gpu: None, tmp_path: Path) -> None:
    tables = list(enumerate_all(H100, 12))
    assert [table.kernel for table in tables] == [name for name, *_ in CHOSEN if name != "window_decode"]
    for table in tables:
        assert table.best_us == table.final_us[0] == table.final_us[1] == 100
        assert None in table.times_us.values() or 1 not in table.space.num_warps
    save(tmp_path / "folder" / "tuning.json", H100, tables)
    gpu, made, found = load(tmp_path / "folder" / "tuning.json")
    assert (gpu, found) == (H100, tables)
    assert made.startswith("times from NVIDIA H100 80GB HBM3, ")


def test_a_limited_space_holds_the_heuristic() -> None:
    for name, *_ in CHOSEN:
        kernel = KERNELS[name]
        case = a_case(name)
        space = limited(kernel, case, H100, 40)
        candidates = Candidates.of(kernel, case, H100, space)
        assert 10 < len(candidates.fitting) <= 40
        assert candidates.key(params_of(kernel.default(case, H100))) is not None


def a_case(name: str) -> Case:
    from gemma3_compile.model_shapes import model_shapes
    from gemma3_compile.presets import preset

    kernel, size, stage, context, where = next(chosen for chosen in CHOSEN if chosen[0] == name)
    uses = KERNELS[kernel].uses(model_shapes(preset(size)), stage, batch=1, context=context, dtype="bfloat16")
    return next(use.case for use in uses if use.name == where)


def a_table(times_us: Mapping[Key, float | None] | None = None, **changes: Any) -> Table:
    """``window_decode``, whose fastest candidate is the one with the most of everything."""
    kernel, case = KERNELS["window_decode"], a_case("window_decode")
    space = limited(kernel, case, H100, 40)
    fitting = Candidates.of(kernel, case, H100, space).fitting
    times = times_us or {key: 100.0 + len(fitting) - at for at, key in enumerate(sorted(fitting))}
    default = kernel.default(case, H100)
    return Table(
        kernel=kernel.name, case=case, space=space, default=default, times_us=times, final_us=(101.0, 120.0), **changes
    )


def test_a_replay_counts_trials_until_one_is_near() -> None:
    table = a_table()
    counts = [trials_until_near(table, H100, "tpe", seed) for seed in range(3)]
    assert all(1 < count <= len(table.times_us) // 2 for count in counts)
    near_nothing = a_table(
        {key: 1000.0 if time_us != table.best_us else 1.0 for key, time_us in table.times_us.items()}
    )
    assert max(trials_until_near(near_nothing, H100, "random", seed) for seed in range(3)) == len(table.times_us)


def test_rows_hold_the_figure_to_reach_and_what_tuning_gains() -> None:
    share, against_chance, gain = rows_of(a_table(), H100, "made up", 1)
    assert (share.peer, share.peer_value) == ("figure to reach", 20.0)
    assert share.note is not None and "4 of them within 3% of the best" in share.note
    assert (against_chance.peer, against_chance.value) == ("random search", share.value)
    assert (gain.value, gain.peer_value) == (101.0, 120.0)
