"""Whether a kernel computes what its oracle does: the rule that tests, tuning and benches share.

    |kernel - fp32 oracle| <= 2 |torch in the same dtype - fp32 oracle| + atol

in the largest error of a tensor and in the root mean square. ``atol`` is a share of the oracle's own size, for where
torch happens to round nothing. Outputs are filled with NaN beforehand, so that one that is not written never passes.

Source: the tests of FlashAttention, which hold a kernel to twice the error of a plain implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What one output has to be: the fp32 oracle's, and how far torch in the same dtype lies from it."""

    exact: Tensor
    torch_max: float
    torch_rms: float
    limit_max: float
    limit_rms: float

    @classmethod
    def of(cls, exact: Tensor, plain: Tensor) -> Expectation:
        wide = exact.double()
        torch_max, torch_rms = _errors(plain.double() - wide)
        size_max, size_rms = _errors(wide)
        return cls(
            exact=exact,
            torch_max=torch_max,
            torch_rms=torch_rms,
            limit_max=2 * torch_max + ATOL * size_max,
            limit_rms=2 * torch_rms + ATOL * size_rms,
        )

    def compare(self, name: str, actual: Tensor) -> Comparison:
        if actual.shape != self.exact.shape:
            raise AssertionError(f"{name} has the shape {tuple(actual.shape)}, its oracle {tuple(self.exact.shape)}")
        kernel_max, kernel_rms = _errors(actual.double() - self.exact.double())
        return Comparison(
            name=name,
            kernel_max=kernel_max,
            torch_max=self.torch_max,
            limit_max=self.limit_max,
            kernel_rms=kernel_rms,
            torch_rms=self.torch_rms,
            limit_rms=self.limit_rms,
        )


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The inputs of a case and its outputs by both oracles, which every configuration is held against."""

    kernel: Kernel
    case: Case
    inputs: Tensors
    outputs: Mapping[str, Expectation]

    @classmethod
    def of(cls, kernel: Kernel, case: Case, inputs: Tensors) -> Expected:
        """Runs the oracles. ``inputs`` stay as they are."""
        exact = kernel.oracle(case, {name: _widened(tensor) for name, tensor in inputs.items()})
        plain = kernel.oracle(case, inputs)
        outputs = {name: Expectation.of(exact[name], plain[name]) for name in exact}
        return cls(kernel=kernel, case=case, inputs=inputs, outputs=outputs)

    @property
    def in_place(self) -> frozenset[str]:
        """The inputs that the kernel writes."""
        return frozenset(self.outputs.keys() & self.inputs.keys())

    def compare(self, config: Config) -> tuple[Comparison, ...]:
        """Runs the kernel on copies of the inputs; one comparison for each output, in-place ones included."""
        copies = {name: tensor.clone() for name, tensor in self.inputs.items()}
        written = self.kernel.outputs(self.case, config, device=next(iter(self.inputs.values())).device)
        for name, tensor in written.items():
            if not name.startswith("_zero"):  # counters that a kernel finds at zero and leaves at zero
                _poison(tensor)
        results = copies | written
        for launch in self.kernel.launches(self.case, config, results):
            launch.run()
        return tuple(expected.compare(name, results[name]) for name, expected in self.outputs.items())


def compare(kernel: Kernel, case: Case, config: Config, inputs: Tensors) -> tuple[Comparison, ...]:
    """Holds one configuration against the oracles: :meth:`Expected.compare`."""
    return Expected.of(kernel, case, inputs).compare(config)


def _poison(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _errors(difference: Tensor) -> tuple[float, float]:
    return float(difference.abs().max()), float(difference.square().mean().sqrt())
