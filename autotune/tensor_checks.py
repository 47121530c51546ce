"""What every launcher asks of its tensors before a pointer reaches a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtimes.errors import UsageError


def check_tensor(
    name: str, tensor: Tensor, *, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Shape, dtype, device and contiguity of one argument.

    Raises:
        UsageError: what was expected, and what came.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise UsageError(f"{name} must have the shape {tuple(shape)}, but has {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise UsageError(f"{name} must be {allowed}, but is {tensor.dtype}")
    if tensor.device != device:
        raise UsageError(f"{name} must be on {device}, but is on {tensor.device}")
    if not tensor.is_contiguous():
        raise UsageError(f"{name} must be contiguous, but has the strides {tensor.stride()}", hint="call .contiguous()")
