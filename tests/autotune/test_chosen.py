"""What a launcher takes that is told no configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autotune import chosen
from autotune.chosen import chosen_config, forget_choices
from autotune.gpu import GPUS, Gpu
from autotune.kernel import Case, Config
from autotune.record_store import Choice, RecordStore
from tests.autotune.test_records import record
from tests.autotune.tiny import CASE, H100, Double

CUDA = torch.device("cuda", 0)
TUNED = Config(constants={"BLOCK": 32, "WRONG": 0}, num_warps=4, num_stages=2)
HEURISTIC = Double().default(CASE, H100)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordStore]:
    """The records of this host, whose GPU is an H100."""
    monkeypatch.setenv("GEMMA3C_RECORDS", str(tmp_path))
    monkeypatch.setattr(chosen, "_present", lambda index: H100)
    forget_choices()
    yield RecordStore()
    forget_choices()


def put(store: RecordStore, config: Config, *, gpu: Gpu = H100) -> None:
    store.put(record(kernel="double", dtype="float32", bucket="size<=64", config=config, case=CASE), gpu)


def test_without_a_record_it_is_the_heuristic() -> None:
    assert chosen_config(Double(), CASE, CUDA) == HEURISTIC


def test_a_record_goes_before_the_heuristic_for_all_of_its_bucket(store: RecordStore) -> None:
    put(store, TUNED)
    assert chosen_config(Double(), CASE, CUDA) == TUNED
    assert chosen_config(Double(), Case(dtype="float32", dims={"size": 64}), CUDA) == TUNED
    assert chosen_config(Double(), Case(dtype="float32", dims={"size": 65}), CUDA) == HEURISTIC


def test_a_similar_gpus_record_stands_in(store: RecordStore) -> None:
    put(store, TUNED, gpu=GPUS["h200"])
    assert chosen_config(Double(), CASE, CUDA) == TUNED


def test_files_are_read_once_until_they_are_forgotten(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    best = RecordStore.best

    def counted(self: RecordStore, kernel: Double, case: Case, gpu: Gpu) -> Choice:
        asked.append(str(case))
        return best(self, kernel, case, gpu)

    monkeypatch.setattr(RecordStore, "best", counted)
    for size in (40, 41, 64):
        assert chosen_config(Double(), Case(dtype="float32", dims={"size": size}), CUDA) == HEURISTIC
    assert asked == ["float32 size=40"]
    put(store, TUNED)
    assert chosen_config(Double(), CASE, CUDA) == HEURISTIC
    forget_choices()
    assert chosen_config(Double(), CASE, CUDA) == TUNED


def test_a_case_that_the_record_of_its_bucket_does_not_fit_has_its_own(store: RecordStore) -> None:
    class Picky(Double):
        def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
            fits = case.dims["size"] >= config.constants["BLOCK"] or config == HEURISTIC
            return None if fits else "more than there are values"

    put(store, TUNED)
    assert chosen_config(Picky(), CASE, CUDA) == TUNED
    assert chosen_config(Picky(), Case(dtype="float32", dims={"size": 20}), CUDA) == HEURISTIC


def test_in_the_interpreter_no_record_counts(store: RecordStore) -> None:
    put(store, TUNED)
    assert chosen_config(Double(), CASE, torch.device("cpu")) == HEURISTIC
