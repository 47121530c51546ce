"""The configuration that a launcher takes where its caller names none: what was tuned for this GPU, or else the heuristic.

Looked up once a process for each bucket. A case that its bucket's record does not fit is looked up for itself.
"""

from __future__ import annotations

from functools import cache

import torch

from autotune.gpu import GPUS, Gpu, present
from autotune.kernel import Case, Config, Kernel
from autotune.record_store import Choice, RecordStore

_CHOICES: dict[tuple[str, str, str, Gpu], Choice] = {}
"""By kernel, dtype, bucket and GPU."""


def chosen_config(kernel: Kernel, case: Case, device: torch.device) -> Config:
    """A record's configuration of this GPU model, or of the most similar one, by the rules of :mod:`autotune.record_store`.

    Args:
        device: on a CPU, where Triton's interpreter runs the launch, it is the heuristic for an H100.

    Raises:
        RecordError: a shipped file of records is damaged.
        HostError: the GPU is older than Ampere.
    """
    if device.type != "cuda":
        return kernel.default(case, GPUS["h100"])
    gpu = _present(torch.cuda.current_device() if device.index is None else device.index)
    key = (kernel.name, case.dtype, kernel.bucket(case), gpu)
    choice = _CHOICES.get(key)
    if choice is None:
        choice = _CHOICES[key] = _store().best(kernel, case, gpu)
    if choice.record is None:
        return kernel.default(case, gpu)
    if kernel.refusal(case, choice.config, gpu) is not None:
        return _store().best(kernel, case, gpu).config
    return choice.config


def forget_choices() -> None:
    """Has records read anew, of which some are written or imported since."""
    _CHOICES.clear()
    _store.cache_clear()


@cache
def _present(index: int) -> Gpu:
    return present(index)


@cache
def _store() -> RecordStore:
    return RecordStore()
