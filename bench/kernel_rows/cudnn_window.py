"""cuDNN's attention with its own sliding window, which torch does not offer: through the package nvidia-cudnn-frontend.

Source: cuDNN frontend's documentation, "Scaled Dot Product Attention": ``diagonal_band_left_bound`` is how many keys a
query sees, its own included; ``diagonal_band_right_bound`` 0 is the causal mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from autotune.kernel import Case, Tensors
from runtimes.errors import HostError


def cudnn_window(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """The window over a chunk that begins the sequence: all of it is one sequence.

    Raises:
        HostError: the package is not installed.
    """
    cudnn = _package()
    q_BNSD, k_BGSD, v_BGSD = (t[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))
    out_BNSD = torch.empty_like(q_BNSD)
    operands = {"q": q_BNSD, "k": k_BGSD, "v": v_BGSD, "out": out_BNSD}
    handle = _handle()
    graph, tensors = window_graph(cudnn, operands, case.dims["window"], case.dims["head_dim"] ** -0.5, handle)
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=q_BNSD.device)
    bound = {tensors[name]: operand for name, operand in operands.items()}

    def run() -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(bound, workspace, handle=handle)
        return out_BNSD.transpose(1, 2)

    return run


def window_graph(cudnn: ModuleType, operands: Tensors, window: int, scale: float, handle: Any) -> tuple[Any, Any]:
    """The validated graph, and its tensors by the operands' names; every operand is bf16 [B, heads, S, D]."""
    bf16, fp32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=bf16, intermediate_data_type=fp32, compute_data_type=fp32, handle=handle)
    tensors = {
        name: graph.tensor(name=name, dim=list(operand.shape), stride=list(operand.stride()), data_type=bf16)
        for name, operand in operands.items()
        if name != "out"
    }
    out, _ = graph.sdpa(
        name="attention",
        **tensors,
        generate_stats=False,
        attn_scale=scale,
        diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT,
        diagonal_band_left_bound=window,
        diagonal_band_right_bound=0,
    )
    wanted = operands["out"]
    out.set_output(True).set_dim(list(wanted.shape)).set_stride(list(wanted.stride())).set_data_type(bf16)
    graph.validate()
    return graph, tensors | {"out": out}


def _package() -> ModuleType:
    try:
        return import_module("cudnn")
    except ModuleNotFoundError as error:
        raise HostError("the package nvidia-cudnn-frontend is not installed") from error


@cache
def _handle() -> Any:
    """One for the process, so that none is destroyed while a graph is captured."""
    return _package().create_handle()
