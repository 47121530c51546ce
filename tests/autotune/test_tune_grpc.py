"""A study behind Optuna's gRPC proxy, which several workers join, and which goes away."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from autotune import storage as storages
from autotune.candidates import Candidates
from autotune.sampler import counts
from autotune.storage import open_storage
from runtimes.errors import HostError
from tests.autotune.tiny import H100, problem

SERVE = """
import sys
from optuna.storages import run_grpc_proxy_server
from autotune.storage import open_storage
run_grpc_proxy_server(open_storage(sys.argv[1]).optuna, host="127.0.0.1", port=int(sys.argv[2]))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_workers_share_a_study_through_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    url = f"grpc://127.0.0.1:{port}"
    proxy = subprocess.Popen([sys.executable, "-c", SERVE, f"journal:///{tmp_path}/study.log", str(port)])
    try:
        monkeypatch.setattr(storages, "CONNECT_S", 120)  # it imports torch first
        storage = open_storage(url)
        commands = [
            [sys.executable, "-m", "tests.autotune.tune_worker", url, str(tmp_path / str(n)), "0.1"] for n in (1, 2)
        ]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        said = [worker.communicate(timeout=180)[0] for worker in workers]
        assert all("warps=4 stages=2, 10.00 µs" in text for text in said)
        study = optuna.load_study(study_name=problem().name, storage=storage.optuna)
        every = Candidates.of(problem().kernel, problem().case, H100)
        keys = [every.key(trial.params) for trial in study.trials if counts(trial)]
        assert sorted(filter(None, keys)) == sorted(every.fitting)
    finally:
        proxy.kill()
        proxy.wait()
    with pytest.raises(HostError, match=rf"the storage {url} failed: "), storage.watched():
        study.get_trials()
    monkeypatch.setattr(storages, "CONNECT_S", 1)
    with pytest.raises(HostError, match=rf"no gRPC proxy answers at 127\.0\.0\.1:{port} within 1 s"):
        open_storage(url)
