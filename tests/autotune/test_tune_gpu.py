"""Tuning on a real GPU: the process that holds it, and compilation ahead of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import TrialState

from autotune.ahead_of_time import CompilerPool
from autotune.candidates import Candidates
from autotune.gpu import present
from autotune.kernel import Config
from autotune.record_store import RecordStore
from autotune.storage import open_storage
from autotune.study import Effort, Problem, Study
from autotune.trial_process import TrialProcess
from autotune.trial_worker import Failed, Measured, Outcome
from autotune.tuning import Tuner
from tests.autotune.tiny import CASE, Double

pytestmark = pytest.mark.gpu


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's cache, empty, of this process and those that it starts."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "triton"


def config(wrong: int = 0) -> Config:
    return Config(constants={"BLOCK": 64, "WRONG": wrong}, num_warps=2, num_stages=1)


def evaluate(process: TrialProcess, chosen: Config) -> Outcome:
    return process.evaluate(Double(), CASE, chosen, lambda repeats, median_us: True)


def cubins(cache: Path) -> set[Path]:
    return set(cache.glob("*/*.cubin"))


def test_a_study_on_this_gpu_leaves_a_record(tmp_path: Path, cache: Path) -> None:
    problem = Problem(kernel=Double(), case=CASE, gpu=present())
    storage = open_storage(f"sqlite:///{tmp_path}/study.db")
    with CompilerPool() as compiler, TrialProcess() as evaluator:
        effort = Effort(sampler="grid", ahead=4)
        tuner = Tuner(storage, RecordStore(tmp_path / "records"), evaluator, effort, compiler=compiler)
        [tuned] = tuner.tune([problem])
        study = Study(problem, storage, evaluator, effort)
    assert tuned.record is not None
    assert 0.3 < tuned.record.time_us < 20
    assert tuned.record.driver != ""
    states = {trial.state for trial in study.counted()}
    assert states <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert study.finished() == len(Candidates.of(Double(), CASE, problem.gpu).fitting)


def test_what_was_compiled_ahead_is_not_compiled_again(cache: Path) -> None:
    kernel, gpu = Double(), present()
    tensors = kernel.inputs(CASE, device="meta") | kernel.outputs(CASE, config(), device="meta")
    with CompilerPool(workers=1) as compiler, TrialProcess() as process:
        for launch in kernel.launches(CASE, config(), tensors):
            compiler.submit(launch, gpu.architecture).result()
        ahead = cubins(cache)
        assert len(ahead) == 1
        assert isinstance(evaluate(process, config()), Measured)
    assert cubins(cache) == ahead


def test_after_an_illegal_access_the_next_candidate_is_timed(cache: Path) -> None:
    with TrialProcess() as process:
        outcome = evaluate(process, config(wrong=6))
        assert isinstance(outcome, Failed)
        assert "illegal memory access" in outcome.reason
        assert isinstance(evaluate(process, config()), Measured)
