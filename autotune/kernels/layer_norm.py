"""LayerNorm, alone or with the residual sum before it, as SigLIP's encoder has it.

Legend: T rows, H hidden.

    plain:     y = norm(x) w + b                norm(x) = (x - mean(x)) / sqrt(var(x) + eps)
    residual:  h' = h + x,   y = norm(h') w + b

Statistics, sums and products are fp32; ``h'`` is rounded before it is normalised, as transformers stores it. A row
fits one program, so that it is read once and its variance is taken around its own mean.

Source: Layer Normalization (arXiv 1607.06450); transformers' ``SiglipEncoderLayer``.
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


def layer_norm_oracle(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float = EPS) -> Tensor:
    """The torch oracle of the plain form: [T, H], in the dtype of ``x_TH``."""
    shape = x_TH.shape[-1:]
    return torch.nn.functional.layer_norm(x_TH.float(), shape, weight_H.float(), bias_H.float(), eps).to(x_TH.dtype)


def add_layer_norm_oracle(
    h_TH: Tensor, x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The torch oracle of the residual form: the new residual stream and its norm, [T, H] each."""
    new_TH = h_TH + x_TH
    return new_TH, layer_norm_oracle(new_TH, weight_H, bias_H, eps)


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, rows, hidden, eps,
    RESIDUAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_H: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release(DEPENDENT)
    row_R = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column_H = tl.arange(0, BLOCK_H)
    inside_RH = (row_R < rows)[:, None] & (column_H < hidden)[None, :]
    offset_RH = row_R.to(tl.int64)[:, None] * hidden + column_H[None, :]
    weight_H = tl.load(weight_ptr + column_H, column_H < hidden, other=0.0).to(tl.float32)
    bias_H = tl.load(bias_ptr + column_H, column_H < hidden, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    x_RH = tl.load(x_ptr + offset_RH, inside_RH, other=0.0).to(tl.float32)
    if RESIDUAL:
        h_RH = (x_RH + tl.load(h_ptr + offset_RH, inside_RH, other=0.0).to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offset_RH, h_RH, inside_RH)
        x_RH = h_RH.to(tl.float32)
    x_RH = tl.where(inside_RH, x_RH - (tl.sum(x_RH, 1) / hidden)[:, None], 0.0)
    y_RH = x_RH * tl.rsqrt(tl.sum(x_RH * x_RH, 1) / hidden + eps)[:, None] * weight_H[None, :] + bias_H[None, :]
    tl.store(y_ptr + offset_RH, y_RH.to(y_ptr.dtype.element_ty), inside_RH)


def layer_norm(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, *, config: Config | None = None) -> Tensor:
    """The plain form.

    Args:
        x_TH: bf16 or fp32.
        weight_H, bias_H: bf16 or fp32.
        config: None takes what was tuned for this GPU, or the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    y_TH = torch.empty_like(x_TH)
    _check(x_TH, weight_H, bias_H, y_TH)
    _launch(config or _chosen(x_TH, residual=False), x_TH, weight_H, bias_H, y_TH).run()
    return y_TH


def add_layer_norm_(
    h_TH: Tensor, x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, *, config: Config | None = None
) -> Tensor:
    """The residual form: adds ``x_TH`` to ``h_TH`` in place and returns the norm of the sum; arguments as above."""
    y_TH = torch.empty_like(x_TH)
    _check(x_TH, weight_H, bias_H, y_TH, h_TH)
    _launch(config or _chosen(x_TH, residual=True), x_TH, weight_H, bias_H, y_TH, h_TH).run()
    return y_TH


def _chosen(x_TH: Tensor, *, residual: bool) -> Config:
    rows, hidden = x_TH.shape
    case = Case(
        dtype=str(x_TH.dtype).removeprefix("torch."),
        dims={"rows": rows, "hidden": hidden, "residual": int(residual)},
    )
    return chosen_config(LayerNorm(), case, x_TH.device)


def _check(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, y_TH: Tensor, h_TH: Tensor | None = None) -> None:
    rows, hidden = x_TH.shape
    for name, tensor in (("x", x_TH), ("y", y_TH)):
        check_tensor(name, tensor, shape=(rows, hidden), dtypes=FLOATS, device=x_TH.device)
    if h_TH is not None:
        check_tensor("h", h_TH, shape=(rows, hidden), dtypes=(x_TH.dtype,), device=x_TH.device)
    for name, tensor in (("weight", weight_H), ("bias", bias_H)):
        check_tensor(name, tensor, shape=(hidden,), dtypes=FLOATS, device=x_TH.device)


def _launch(
    config: Config, x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, y_TH: Tensor, h_TH: Tensor | None = None
) -> Launch:
    tensors = {"x": x_TH, "weight": weight_H, "bias": bias_H, "y": y_TH, "h": h_TH}
    return norm_launch(_layer_norm_kernel, config, tensors, EPS)


class LayerNorm(RowNorm):
    """The residual form at ``residual`` 1, the plain one at 0."""

    name: ClassVar[str] = "layer_norm"
    stages: ClassVar[tuple[Stage, ...]] = ("vision",)
    source: ClassVar[tuple[str, ...]] = ("autotune.kernels.layer_norm",)
    MOST_ROWS: ClassVar[int] = 4096

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage != "vision" or model.vision is None:
            return ()
        floats = dtype if dtype in self.dtypes else "bfloat16"
        rows, hidden = batch * model.vision.patches, model.vision.hidden
        first = Case(dtype=floats, dims={"rows": rows, "hidden": hidden, "residual": 0})
        others = Case(dtype=floats, dims={"rows": rows, "hidden": hidden, "residual": 1})
        return (
            Use(name="first norm", case=first, count=1),
            Use(name="residual and norm", case=others, count=2 * model.vision.layers),
        )

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        draw, dtype = Draw(device, seed), getattr(torch, case.dtype)
        rows, hidden = case.dims["rows"], case.dims["hidden"]
        tensors = {
            "x": draw.normal(rows, hidden, dtype=dtype, mean=1, deviation=3),  # a mean that is not zero
            "weight": draw.scale(hidden).to(dtype),
            "bias": draw.normal(hidden, dtype=dtype),
        }
        return tensors | ({"h": draw.normal(rows, hidden, dtype=dtype)} if case.dims["residual"] else {})

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        t = tensors
        return (_launch(config, t["x"], t["weight"], t["bias"], t["y"], t.get("h")),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        if not case.dims["residual"]:
            return {"y": layer_norm_oracle(inputs["x"], inputs["weight"], inputs["bias"])}
        h, y = add_layer_norm_oracle(inputs["h"], inputs["x"], inputs["weight"], inputs["bias"])
        return {"h": h, "y": y}

    def cost(self, case: Case) -> Cost:
        width = getattr(torch, case.dtype).itemsize
        passes = 4 if case.dims["residual"] else 2
        rows, hidden = case.dims["rows"], case.dims["hidden"]
        return Cost(bytes=(passes * rows + 2) * hidden * width, flops=(passes + 6) * rows * hidden)
