"""RMSNorm, alone or with what stands beside it in a Gemma 3 layer: post-norm, residual sum and pre-norm in one pass.

Legend: T rows, H hidden.

    plain:     y = rms(x) scale                          rms(x) = x / sqrt(mean(x**2) + eps)
    residual:  h' = h + rms(x) scale,   y = rms(h') next_scale

``scale`` is the whole factor, 1 + w, in fp32. Sums and products are fp32; every stored tensor is rounded once, and in
between where transformers rounds: the post-norm and the sum. A row fits one program, so that it is read once.

Source: RMSNorm (arXiv 1910.07467); Gemma 3 report (arXiv 2503.19786), section 2.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.chosen import chosen_config
from autotune.draw import Draw
from autotune.kernel import Case, Config, Cost, Stage, Tensors, Use
from autotune.kernels.dependent import release, wait
from autotune.kernels.norm_rows import FLOATS, RowNorm, norm_launch
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor

EPS = 1e-6


def rms_norm_oracle(x_TH: Tensor, scale_H: Tensor, eps: float = EPS) -> Tensor:
    """The torch oracle of the plain form: [T, H], in the dtype of ``x_TH``."""
    return torch.nn.functional.rms_norm(x_TH.float(), x_TH.shape[-1:], scale_H.float(), eps).to(x_TH.dtype)


def add_rms_norm_oracle(
    h_TH: Tensor, x_TH: Tensor, scale_H: Tensor, next_scale_H: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The torch oracle of the residual form: the new residual stream and its norm, [T, H] each."""
    new_TH = h_TH + rms_norm_oracle(x_TH, scale_H, eps)
    return new_TH, rms_norm_oracle(new_TH, next_scale_H, eps)


@triton.jit
def _rms_norm_kernel(
    x_ptr, scale_ptr, y_ptr, h_ptr, next_scale_ptr, rows, hidden, eps,
    RESIDUAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_H: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release(DEPENDENT)
    row_R = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column_H = tl.arange(0, BLOCK_H)
    inside_RH = (row_R < rows)[:, None] & (column_H < hidden)[None, :]
    offset_RH = row_R.to(tl.int64)[:, None] * hidden + column_H[None, :]
    scale_H = tl.load(scale_ptr + column_H, column_H < hidden, other=0.0)  # weights do not have to be waited for
    if RESIDUAL:
        next_scale_H = tl.load(next_scale_ptr + column_H, column_H < hidden, other=0.0)
    wait(DEPENDENT)
    x_RH = tl.load(x_ptr + offset_RH, inside_RH, other=0.0).to(tl.float32)
    y_RH = x_RH * tl.rsqrt(tl.sum(x_RH * x_RH, 1) / hidden + eps)[:, None] * scale_H[None, :]
    if RESIDUAL:
        stored = h_ptr.dtype.element_ty
        h_RH = tl.load(h_ptr + offset_RH, inside_RH, other=0.0).to(tl.float32)
        h_RH = (h_RH + y_RH.to(stored).to(tl.float32)).to(stored)
        tl.store(h_ptr + offset_RH, h_RH, inside_RH)
        h_RH = h_RH.to(tl.float32)
        y_RH = h_RH * tl.rsqrt(tl.sum(h_RH * h_RH, 1) / hidden + eps)[:, None] * next_scale_H[None, :]
    tl.store(y_ptr + offset_RH, y_RH.to(y_ptr.dtype.element_ty), inside_RH)


def rms_norm(x_TH: Tensor, scale_H: Tensor, *, config: Config | None = None) -> Tensor:
    """The plain form.

    Args:
        x_TH: bf16 or fp32.
        scale_H: fp32, 1 + w.
        config: None takes what was tuned for this GPU, or the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    y_TH = torch.empty_like(x_TH)
    _check(x_TH, scale_H, y_TH)
    _launch(config or _chosen(x_TH, residual=False), x_TH, scale_H, y_TH).run()
    return y_TH


def add_rms_norm_(
    h_TH: Tensor, x_TH: Tensor, scale_H: Tensor, next_scale_H: Tensor, *, config: Config | None = None
) -> Tensor:
    """The residual form: adds to ``h_TH`` in place and returns the norm of the sum; arguments as above."""
    y_TH = torch.empty_like(x_TH)
    _check(x_TH, scale_H, y_TH, h_TH, next_scale_H)
    _launch(config or _chosen(x_TH, residual=True), x_TH, scale_H, y_TH, h_TH, next_scale_H).run()
    return y_TH


def _chosen(x_TH: Tensor, *, residual: bool) -> Config:
    rows, hidden = x_TH.shape
    case = Case(
        dtype=str(x_TH.dtype).removeprefix("torch."),
        dims={"rows": rows, "hidden": hidden, "residual": int(residual)},
    )
    return chosen_config(RmsNorm(), case, x_TH.device)


def _check(
    x_TH: Tensor, scale_H: Tensor, y_TH: Tensor, h_TH: Tensor | None = None, next_scale_H: Tensor | None = None
) -> None:
    rows, hidden = x_TH.shape
    for name, tensor in (("x", x_TH), ("y", y_TH), ("h", h_TH)):
        if tensor is not None:
            check_tensor(name, tensor, shape=(rows, hidden), dtypes=FLOATS, device=x_TH.device)
    for name, tensor in (("scale", scale_H), ("next_scale", next_scale_H)):
        if tensor is not None:
            check_tensor(name, tensor, shape=(hidden,), dtypes=(torch.float32,), device=x_TH.device)


def _launch(
    config: Config,
    x_TH: Tensor,
    scale_H: Tensor,
    y_TH: Tensor,
    h_TH: Tensor | None = None,
    next_scale_H: Tensor | None = None,
) -> Launch:
    tensors = {"x": x_TH, "scale": scale_H, "y": y_TH, "h": h_TH, "next_scale": next_scale_H}
    return norm_launch(_rms_norm_kernel, config, tensors, EPS)


class RmsNorm(RowNorm):
    """The residual form at ``residual`` 1, the plain one at 0."""

    name: ClassVar[str] = "rms_norm"
    stages: ClassVar[tuple[Stage, ...]] = ("prefill", "decode")
    source: ClassVar[tuple[str, ...]] = ("autotune.kernels.rms_norm",)
    MOST_ROWS: ClassVar[int] = 1024

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage == "vision":
            return ()
        rows = batch if stage == "decode" else batch * context
        dims = {"rows": rows, "hidden": model.hidden}
        return (
            Use(name="first norm", case=Case(dtype="bfloat16", dims=dims | {"residual": 0}), count=1),
            Use(
                name="norms and residual",
                case=Case(dtype="bfloat16", dims=dims | {"residual": 1}),
                count=2 * model.layers,
            ),
        )

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        draw, dtype = Draw(device, seed), getattr(torch, case.dtype)
        shape = (case.dims["rows"], case.dims["hidden"])
        tensors = {"x": draw.normal(*shape, dtype=dtype, deviation=3), "scale": draw.scale(shape[1])}
        if case.dims["residual"]:
            tensors |= {"h": draw.normal(*shape, dtype=dtype, deviation=3), "next_scale": draw.scale(shape[1])}
        return tensors

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        t = tensors
        return (_launch(config, t["x"], t["scale"], t["y"], t.get("h"), t.get("next_scale")),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        if not case.dims["residual"]:
            return {"y": rms_norm_oracle(inputs["x"], inputs["scale"])}
        h, y = add_rms_norm_oracle(inputs["h"], inputs["x"], inputs["scale"], inputs["next_scale"])
        return {"h": h, "y": y}

    def cost(self, case: Case) -> Cost:
        width = getattr(torch, case.dtype).itemsize
        passes = 4 if case.dims["residual"] else 2
        rows, hidden = case.dims["rows"], case.dims["hidden"]
        return Cost(bytes=passes * rows * hidden * width, flops=passes * 4 * rows * hidden)
