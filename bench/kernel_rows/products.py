"""Products: a token's vector with bf16, int8 and int4 weights against what memory allows, and a chunk's against cuBLAS.

Legend: M rows, N columns, K depth; F = N / 2 where gate and up are multiplied at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.kernel import Case, Kernel, Tensors
from autotune.model_shapes import ModelShapes
from bench.kernel_rows.subject import Figures, Peer, Sizes, Subject, use_of

CUBLAS, CUBLAS_BF16 = "F.linear (cuBLAS)", "F.linear (cuBLAS), bf16 weights"
GEGLU = "F.linear (cuBLAS), then GeGLU"
READ_SHARE = {"head": 0.92, "gate and up": 0.92, "qkv": 0.85, "down": 0.85}
"""Of the measured read rate, for bf16 weights."""
INT4_READ_SHARE = 0.75
CUBLAS_SHARE = 0.85


def subjects(sizes: Sizes) -> list[Subject]:
    """Decode's matvecs by dtype, then the prefill's products of both models."""
    places = ((sizes.small, "head"), (sizes.large, "gate and up"), (sizes.large, "qkv"), (sizes.large, "down"))
    vectors = [_matvec(model, where, dtype) for dtype in ("bfloat16", "int8", "int4") for model, where in places]
    layer = ("qkv", "attention out", "gate and up", "down")
    return vectors + [_matmul(model, where, sizes.chunk) for model in (sizes.small, sizes.large) for where in layer]


def _matvec(model: ModelShapes, where: str, dtype: str) -> Subject:
    kernel, case = use_of("matvec", model, "decode", where, context=1, dtype=dtype)
    rows, columns = _weight_shape(kernel, case)
    beside = _beside(case)
    if dtype == "bfloat16":
        peer = Peer(label=CUBLAS, prepare=linear, returns=None if beside else "y", remark=beside)
    else:
        peer = Peer(label=CUBLAS_BF16, prepare=linear_in_bf16, remark=beside)
    share = {"bfloat16": READ_SHARE[where], "int8": 0.0, "int4": INT4_READ_SHARE}[dtype]
    return Subject(
        name=f"matvec {_short(dtype)} {rows}x{columns} ({model.name} {where})",
        kernel=kernel,
        case=case,
        peers=(peer,),
        figures=Figures(read_share=share),
    )


def _matmul(model: ModelShapes, where: str, chunk: int) -> Subject:
    kernel, case = use_of("matmul", model, "prefill", where, context=chunk)
    rows, columns = _weight_shape(kernel, case)
    beside = _beside(case)
    peers = [Peer(label=CUBLAS, prepare=linear, returns=None if beside else "y", remark=beside)]
    if beside:
        peers.append(Peer(label=GEGLU, prepare=linear_geglu, returns="y"))
    return Subject(
        name=f"matmul bf16 {chunk} rows, {rows}x{columns} ({model.name} {where})",
        kernel=kernel,
        case=case,
        peers=tuple(peers),
        figures=Figures(speed=(CUBLAS_SHARE, (CUBLAS,)), rate=True),
    )


def _beside(case: Case) -> str | None:
    """What the kernel does besides the product."""
    words = {"norm": "RMSNorm before the product", "geglu": "GeGLU after the product"}
    found = [word for name, word in words.items() if case.dims.get(name)]
    return f"in our time alone: {' and '.join(found)}" if found else None


def linear(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """x W^T alone, whatever the case has beside it."""
    return lambda: F.linear(t["x"], t["w"])


def linear_in_bf16(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """The product with bf16 weights of the same shape, for quantised ones."""
    x_MK = t["x"]
    w_NK = torch.empty(t["codes"].shape[0], x_MK.shape[1], dtype=torch.bfloat16, device=x_MK.device).normal_()
    return lambda: F.linear(x_MK, w_NK)


def linear_geglu(case: Case, t: Tensors) -> Callable[[], Tensor]:
    """The product, then gelu(gate) times up in two more programs."""

    def run() -> Tensor:
        gate_MF, up_MF = F.linear(t["x"], t["w"]).chunk(2, dim=1)
        return F.gelu(gate_MF, approximate="tanh") * up_MF

    return run


def _weight_shape(kernel: Kernel, case: Case) -> tuple[int, int]:
    """Rows and columns of the weights as they are stored, unpacked."""
    inputs = kernel.inputs(case, device="meta")
    return inputs["w" if "w" in inputs else "codes"].shape[0], inputs["x"].shape[1]


def _short(dtype: str) -> str:
    return "bf16" if dtype == "bfloat16" else dtype
