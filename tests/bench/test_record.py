"""What a result file says of where it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import record
from bench.record import Row, finish, with_gpu

ROWS = [Row(case="a", metric="time", unit="µs", value=1.23456789)]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_a_copy_without_history_has_an_unknown_commit(results: Path) -> None:
    finish("kernels-h100", ROWS, quick=False)
    written = json.loads((results / "kernels-h100.json").read_text())
    assert written["commit"] == record.UNKNOWN
    assert written["rows"] == [
        {"case": "a", "metric": "time", "unit": "µs", "value": 1.2346, "peer": None, "peer_value": None, "ratio": None}
    ]


def test_the_given_commit_goes_before_gits(results: Path) -> None:
    finish("kernels-h100", ROWS, quick=False, measured="0123456789ab")
    assert json.loads((results / "kernels-h100.json").read_text())["commit"] == "0123456789ab"


def test_quick_writes_nothing(results: Path) -> None:
    finish("kernels-h100", ROWS, quick=True)
    assert not results.exists()


def test_gpu_facts_stand_where_a_gpu_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20,
        total_memory=80 * 2**30,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(record, "_driver", lambda: "580.95.05")
    assert record.hardware()["gpu"] == {
        "name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "multiprocessors": 132, "l2_mib": 50.0,
        "memory_gib": 80.0,
    }  # fmt: skip
    versions = record.versions()
    assert versions["nvidia-driver"] == "580.95.05" and versions["cudnn"] == "9.19.0"
    assert {"cuda", "torch", "triton"} <= versions.keys()


def test_no_gpu_facts_where_none_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert "gpu" not in record.hardware()
    assert record.versions().keys().isdisjoint({"cuda", "cudnn", "nvidia-driver"})


def test_the_file_is_named_by_the_gpu() -> None:
    assert with_gpu("kernels", "NVIDIA H100 80GB HBM3") == "kernels-h100"
    assert with_gpu("kernels", "NVIDIA Z9 (rev. 2)") == "kernels-nvidia-z9-rev-2"
