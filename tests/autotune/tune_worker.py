"""A worker of a study, in a process of its own: ``python -m tests.autotune.tune_worker URL RECORDS SECONDS``.

Tries every candidate of the tiny kernel, each of which takes SECONDS, and prints what came of the study.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import optuna

from autotune.record_store import RecordStore
from autotune.storage import open_storage
from autotune.study import Effort
from autotune.tuning import Tuner
from tests.autotune.tiny import InProcess, problem

if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url, records, seconds = sys.argv[1:]
    tuner = Tuner(
        open_storage(url), RecordStore(Path(records)), InProcess(delay_s=float(seconds)), Effort(sampler="grid")
    )
    for tuned in tuner.tune([problem()]):
        sys.stdout.write(f"{tuned}\n")
