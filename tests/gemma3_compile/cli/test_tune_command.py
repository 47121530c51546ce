"""``gemma3c tune``: options, what is said without a GPU, and a whole run of the tiny kernel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
from optuna.trial import TrialState

from autotune import ahead_of_time, ceilings, gpu, registry, trial_process
from autotune.ceilings import Ceilings
from autotune.kernel import Case, Config, Kernel
from autotune.record_store import RecordStore
from autotune.storage import open_storage
from autotune.trial_worker import GoOn, Outcome
from gemma3_compile.cli.tune_command import DEFAULT_CONTEXTS, ahead, contexts_of
from runtimes.errors import HostError, UsageError
from tests.autotune.tiny import H100, Double, InProcess, problem
from tests.gemma3_compile.cli.conftest import Gemma3c


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA3C_RECORDS", str(tmp_path / "records"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GEMMA3C_STORAGE", raising=False)


class Evaluator(InProcess):
    """Stands in for the process with the GPU."""

    stop_after: int | None = None

    def __init__(self, *, limit_s: float) -> None:
        super().__init__()
        self.limit_s = limit_s

    def start(self) -> None:
        pass

    def evaluate(self, kernel: Kernel, case: Case, config: Config, go_on: GoOn) -> Outcome:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        return super().evaluate(kernel, case, config, go_on)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class NoCompiler:
    """Compiles nothing, so that the evaluator has to."""

    def __init__(self, *, timeout_s: float) -> None:
        pass

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> type[Evaluator]:
    """A host with a GPU and the one kernel ``double``."""
    monkeypatch.setattr(gpu, "present", lambda: H100)
    slow = Ceilings(read_bytes_per_s=1e9, read_by="a test", bf16_flops=1e12, product_by="a test")
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda: slow)
    monkeypatch.setattr(registry, "KERNELS", MappingProxyType({"double": Double()}))
    monkeypatch.setattr(trial_process, "TrialProcess", Evaluator)
    monkeypatch.setattr(ahead_of_time, "CompilerPool", NoCompiler)
    monkeypatch.setattr(Evaluator, "stop_after", None)
    return Evaluator


def test_without_a_gpu_it_says_so(gemma3c: Gemma3c, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise HostError("no CUDA GPU is visible to torch", hint="check `nvidia-smi`, and that torch is a CUDA build")

    monkeypatch.setattr(gpu, "present", absent)
    result = gemma3c("tune", "--size", "4b")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: no CUDA GPU is visible to torch\nhint: check `nvidia-smi`")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kernel", "matve"], 2, "no kernel is named `matve`\nhint: the kernels are cache_write, embed, "),
        (["--sampler", "tpee"], 2, "expected one of tpe, grid, random, but got 'tpee'; did you mean 'tpe'?"),
        (["--trials", "0"], 2, "--trials"),
        (["--timeout", "0"], 2, "--timeout"),
        (["--size", "270m", "--context", "40000"], 2, "--context 40000 is more than the 32768 tokens that 270m takes"),
        (["--export", "x.json", "--trials", "3"], 2, "--trials says how to tune, but --export and --import only move records"),
        (["--import", "x.json", "--json"], 2, "--json says how to tune"),
        (["--export", "x.json"], 2, "there are no records in "),
        (["--import", "/no/such/file.json"], 1, "/no/such/file.json: No such file or directory"),
    ],
)  # fmt: skip
def test_wrong_usage(gemma3c: Gemma3c, arguments: list[str], code: int, message: str) -> None:
    result = gemma3c("tune", *arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_a_run_prints_each_study_and_keeps_records(gemma3c: Gemma3c, host: type[Evaluator], tmp_path: Path) -> None:
    result = gemma3c("tune", "--size", "270m", "--sampler", "grid")
    assert result.code == 0
    assert result.out == (
        "double size<=1024: BLOCK=32 WRONG=0 warps=4 stages=2, 10.00 µs, 51% of the roofline, 2.05× the heuristic's speed\n"
    )
    assert result.err == (
        f"1 study on {H100.name}, kept in sqlite:///{tmp_path}/cache/gemma3c/tuning.db; records go to {tmp_path}/records\n"
    )
    case = Case(dtype="float32", dims={"size": 640})
    assert RecordStore().best(Double(), case, H100).tuned_here


def test_a_gpu_too_full_to_be_measured_is_tuned_all_the_same(
    gemma3c: Gemma3c, host: type[Evaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_full() -> Ceilings:
        raise HostError("4 GB are needed, but 1 GB are free")

    monkeypatch.setattr(ceilings, "measure_ceilings", too_full)
    result = gemma3c("tune", "--size", "270m", "--trials", "3")
    assert result.code == 0
    assert result.err.startswith("4 GB are needed, but 1 GB are free: the datasheet's rates stand\n")


def test_json_holds_the_records(gemma3c: Gemma3c, host: type[Evaluator]) -> None:
    result = gemma3c("tune", "--size", "270m", "--size", "4b", "--trials", "5", "--json")
    assert result.code == 0
    first, second = json.loads(result.out)
    assert (first["kernel"], first["gpu"], first["bucket"]) == ("double", H100.name, "size<=1024")
    assert (first["trials"], first["planned"], first["ended_early"]) == (5, 5, None)
    assert first["record"]["case"] == {"dtype": "float32", "dims": {"size": 640}}
    assert second["record"]["case"]["dims"] == {"size": 2560}


def test_an_interrupt_leaves_the_study_and_no_record(gemma3c: Gemma3c, host: type[Evaluator], tmp_path: Path) -> None:
    host.stop_after = 4
    stopped = gemma3c("tune", "--size", "270m", "--sampler", "grid")
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err.split("\n", 1)[1].split() == (
        [
            "double",
            "size<=1024:",
            "stopped",
            "after",
            "4",
            "of",
            "34",
            "trials;",
            "the",
            "same",
            "command",
            "goes",
            "on",
            "interrupted",
        ]
    )
    assert not list((tmp_path / "records").glob("*.json"))
    host.stop_after = None
    assert gemma3c("tune", "--size", "270m", "--sampler", "grid").code == 0
    import optuna

    name = problem(case=Case(dtype="float32", dims={"size": 640})).name
    trials = optuna.load_study(study_name=name, storage=open_storage(None).optuna).trials
    states = [trial.state for trial in trials]
    assert states.count(TrialState.FAIL) == ahead(), "so many trials were in hand, one of which was being timed"
    assert len(trials) == 34 + ahead()


def test_nothing_found_is_a_failure(gemma3c: Gemma3c, host: type[Evaluator]) -> None:
    result = gemma3c("tune", "--size", "270m", "--timeout", "0.000001")
    assert result.code == 1
    assert result.out == "double size<=1024: nothing was found (0 of 30 trials: its time was up)\n"


@pytest.mark.parametrize("way", ["option", "variable"])
def test_the_password_of_a_storage_is_never_said(
    gemma3c: Gemma3c, host: type[Evaluator], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "postgresql://me:hunter2@127.0.0.1:1/db"
    if way == "variable":
        monkeypatch.setenv("GEMMA3C_STORAGE", url)
    result = gemma3c("tune", "--size", "270m", *(["--storage", url] if way == "option" else []))
    assert result.code == 1
    assert result.err.startswith("error: the storage postgresql://me:***@127.0.0.1:1/db cannot be reached: ")
    assert "hunter2" not in result.err + result.out
    assert gemma3c("tune", "--storage", "me:hunter2@host/db").err.startswith(
        "error: what --storage names is no storage"
    )


def test_records_move_between_folders(
    gemma3c: Gemma3c, host: type[Evaluator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma3c("tune", "--size", "270m", "--trials", "5")
    moved = tmp_path / "moved.json"
    assert gemma3c("tune", "--export", moved).out == f"1 records written to {moved}\n"
    monkeypatch.setenv("GEMMA3C_RECORDS", str(tmp_path / "elsewhere"))
    imported = gemma3c("tune", "--import", moved)
    assert imported.out == f"1 records added, 0 replaced by faster ones, 0 kept in {tmp_path}/elsewhere\n"
    assert "0 records added" in gemma3c("tune", "--import", moved).out
    damaged = tmp_path / "damaged.json"
    damaged.write_text(moved.read_text()[:-20])
    refused = gemma3c("tune", "--import", damaged)
    assert refused.code == 1
    assert f"{damaged} is not JSON" in refused.err


def test_contexts_are_those_that_a_model_takes() -> None:
    assert contexts_of("4b", ()) == DEFAULT_CONTEXTS
    assert contexts_of("nano", ()) == (512,)
    assert contexts_of("4b", (77,)) == (77,)
    with pytest.raises(UsageError):
        contexts_of("nano", (513,))


def test_every_option_has_help(gemma3c: Gemma3c) -> None:
    shown = gemma3c("tune", "--help").out
    wanted: Sequence[str] = ("--kernel", "--size", "--context", "--batch", "--dtype", "--trials", "--timeout", "--storage", "--sampler", "--export", "--import")  # fmt: skip
    assert all(name in shown for name in wanted)
    assert "GEMMA3C_STORAGE" in shown
