"""The check that every kernel's tests make: the kernel, run as the tests' host can, against its oracle."""

from __future__ import annotations

import torch

from autotune.correctness import compare
from autotune.gpu import GPUS
from autotune.kernel import Case, Config, Kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""On a CPU Triton's interpreter runs the kernels (tests/conftest.py switches it on)."""
H100 = GPUS["h100"]


def check_kernel(kernel: Kernel, case: Case, config: Config | None = None, *, seed: int = 0) -> None:
    """Fails where an output lies further from the fp32 oracle than the rule of ``autotune.correctness`` allows."""
    chosen = config or kernel.default(case, H100)
    refused = kernel.refusal(case, chosen, H100)
    assert refused is None, f"{case}: {chosen}: {refused}"
    for comparison in compare(kernel, case, chosen, kernel.inputs(case, device=DEVICE, seed=seed)):
        assert comparison.passed, f"{kernel.name}, {case}, {chosen}: {comparison}"
