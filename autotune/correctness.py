"""Whether a kernel computes what its oracle does: the rule that tests, tuning and benches share.

    |kernel - fp32 oracle| <= 2 |torch in the same dtype - fp32 oracle| + atol

in the largest error of a tensor and in the root mean square. ``atol`` is a share of the oracle's own size, for where
torch happens to round nothing. Outputs are filled with NaN beforehand, so that one that is not written never passes.

Source: the tests of FlashAttention, which hold a kernel to twice the error of a plain implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.kernel import Case, Config, Kernel, Tensors

ATOL = 1e-5
"""Share of the oracle's largest magnitude, or of its root mean square: fp32 sums in another order."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One output tensor: errors of the kernel and of torch in the same dtype against the fp32 oracle."""

    name: str
    kernel_max: float
    torch_max: float
    limit_max: float
    kernel_rms: float
    torch_rms: float
    limit_rms: float

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.kernel_max <= self.limit_max and self.kernel_rms <= self.limit_rms

    def __str__(self) -> str:
        return (
            f"{self.name}: max error {self.kernel_max:.3g} (torch {self.torch_max:.3g}, limit {self.limit_max:.3g}), "
            f"rms {self.kernel_rms:.3g} (torch {self.torch_rms:.3g}, limit {self.limit_rms:.3g})"
        )


def compare(kernel: Kernel, case: Case, config: Config, inputs: Tensors) -> tuple[Comparison, ...]:
    """Runs the kernel on copies of ``inputs`` and both oracles; one comparison for each output, in-place ones included."""
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    written = kernel.outputs(case, config, device=next(iter(inputs.values())).device)
    for name, tensor in written.items():
        if not name.startswith("_zero"):  # counters that a kernel finds at zero and leaves at zero
            _poison(tensor)
    for launch in kernel.launches(case, config, copies | written):
        launch.run()
    exact = kernel.oracle(case, {name: _widened(tensor) for name, tensor in inputs.items()})
    plain = kernel.oracle(case, inputs)
    results = copies | written
    return tuple(_compared(name, results[name], plain[name], exact[name]) for name in exact)


def _poison(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _compared(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> Comparison:
    if actual.shape != exact.shape:
        raise AssertionError(f"{name} has the shape {tuple(actual.shape)}, its oracle {tuple(exact.shape)}")
    e = exact.double()
    kernel_max, kernel_rms = _errors(actual.double() - e)
    torch_max, torch_rms = _errors(plain.double() - e)
    size_max, size_rms = _errors(e)
    return Comparison(
        name=name,
        kernel_max=kernel_max,
        torch_max=torch_max,
        limit_max=2 * torch_max + ATOL * size_max,
        kernel_rms=kernel_rms,
        torch_rms=torch_rms,
        limit_rms=2 * torch_rms + ATOL * size_rms,
    )


def _errors(difference: Tensor) -> tuple[float, float]:
    return float(difference.abs().max()), float(difference.square().mean().sqrt())
