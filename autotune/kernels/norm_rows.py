"""What norms of rows have in common: a program takes a few whole rows, and reads each once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Kernel, Space, Tensors
from autotune.kernels.dependent import best_dependent, dependent_refusal
from autotune.launch import Launch

FLOATS = (torch.float32, torch.bfloat16)


class RowNorm(Kernel):
    """Dims ``rows``, ``hidden``, and ``residual`` 1 where a sum comes before or after the norm."""

    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float32")
    MOST_ROWS: ClassVar[int]
    """Cases of more rows share a bucket."""

    def bucket(self, case: Case) -> str:
        rows = min(triton.next_power_of_2(case.dims["rows"]), self.MOST_ROWS)
        return f"{case.dtype} rows<={rows} hidden={case.dims['hidden']} residual={case.dims['residual']}"

    def space(self, case: Case) -> Space:
        constants = {"BLOCK_ROWS": (1, 2, 4, 8), "DEPENDENT": (0, 1)}
        return Space(constants=constants, num_warps=(1, 2, 4, 8, 16), num_stages=(1,))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        values = config.constants["BLOCK_ROWS"] * triton.next_power_of_2(case.dims["hidden"])
        if values // (32 * config.num_warps) > 128:
            return f"{values} values in {config.num_warps} warps take more than 128 registers a thread"
        return dependent_refusal(config.constants["DEPENDENT"], gpu)

    def default(self, case: Case, gpu: Gpu) -> Config:
        return norm_config(case.dims["hidden"], best_dependent(gpu))

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        shape = (case.dims["rows"], case.dims["hidden"])
        return {"y": torch.empty(shape, dtype=getattr(torch, case.dtype), device=device)}


def norm_config(hidden: int, dependent: int = 0) -> Config:
    """The heuristic: a row a program."""
    return Config(
        constants={"BLOCK_ROWS": 1, "DEPENDENT": dependent}, num_warps=8 if hidden > 2048 else 4, num_stages=1
    )


def norm_launch(function: object, config: Config, tensors: Mapping[str, Tensor | None], eps: float) -> Launch:
    """The launch over ``tensors``, named as the function's pointers but for ``_ptr``; with ``h`` it is the residual form."""
    x_TH = tensors["x"]
    assert x_TH is not None
    rows, hidden = x_TH.shape
    arguments: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items() if tensor is not None}
    constants: dict[str, Any] = {f"{name}_ptr": None for name, tensor in tensors.items() if tensor is None}
    constants |= dict(config.constants) | {"RESIDUAL": tensors["h"] is not None}
    return Launch(
        function=function,
        grid=(triton.cdiv(rows, config.constants["BLOCK_ROWS"]), 1, 1),
        arguments=arguments | {"rows": rows, "hidden": hidden, "eps": eps},
        constants=constants | {"BLOCK_H": triton.next_power_of_2(hidden)},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        dependent=bool(config.constants["DEPENDENT"]),
    )
