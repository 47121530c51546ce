"""Random tensors for a kernel's inputs, or on the ``meta`` device their shapes only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Draw:
    """Draws tensors from a seed, on the device where they are needed; every call goes on in the same stream.

    Args:
        device: on ``meta`` nothing is drawn, and the tensors hold no data.
    """

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.meta = torch.device(device).type == "meta"
        self._how: dict[str, Any] = {"device": device}
        if not self.meta:
            self._how["generator"] = torch.Generator(device=device).manual_seed(seed)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, deviation: float = 1.0
    ) -> Tensor:
        """Normally distributed, drawn in fp32 and rounded to ``dtype``."""
        drawn: Tensor = torch.randn(shape, **self._how)
        return drawn.mul_(deviation).add_(mean).to(dtype)

    def scale(self, *shape: int) -> Tensor:
        """A norm's factor, fp32: 1 + w, w small."""
        return self.normal(*shape, mean=1.0, deviation=0.25)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """fp32 in [low, high)."""
        drawn: Tensor = torch.rand(shape, **self._how)
        return drawn.mul_(high - low).add_(low)

    def integers(self, *shape: int, low: int = 0, high: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Whole numbers from ``low`` to ``high`` - 1."""
        drawn: Tensor = torch.randint(low, high, shape, dtype=dtype, **self._how)
        return drawn
