"""SigLIP pooling on a GPU: the mean over a square of patches and the RMSNorm after it, each patch read once.

Legend: N images, P patches (a square of side p), T tokens (a square of side p / pool), H hidden; in the kernel, Q
patches of a square at a time.

    y = rms(mean over the pool x pool square of x) scale        rms(x) = x / sqrt(mean(x**2) + eps)

The mean is rounded once, as transformers stores it; everything else is fp32. A program makes one token. The oracle
is :func:`autotune.kernels.siglip_pool.siglip_pool`, which graphs use where there is no Triton.

Source: Gemma 3 report (arXiv 2503.19786), section 2.1; transformers' ``Gemma3MultiModalProjector``.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.draw import Draw
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.dependent import best_dependent, dependent_refusal, release, wait
from autotune.kernels.siglip_pool import siglip_pool as siglip_pool_oracle
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor
from runtimes.errors import UsageError

EPS = 1e-6
_FLOATS = (torch.float32, torch.bfloat16)


@triton.jit
def _pool_norm_kernel(
    x_ptr, scale_ptr, y_ptr, side, hidden, eps,
    POOL: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_H: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release(DEPENDENT)
    tokens_side = side // POOL
    token = tl.program_id(0)
    image = token // (tokens_side * tokens_side)
    top = token // tokens_side % tokens_side * POOL
    left = token % tokens_side * POOL
    first = image.to(tl.int64) * side * side + top * side + left
    column_H = tl.arange(0, BLOCK_H)
    scale_H = tl.load(scale_ptr + column_H, column_H < hidden, other=0.0)
    wait(DEPENDENT)
    sum_H = tl.zeros([BLOCK_H], tl.float32)
    for begin in tl.static_range(0, POOL * POOL, BLOCK_PATCHES):
        patch_Q = begin + tl.arange(0, BLOCK_PATCHES)
        row_Q = first + patch_Q // POOL * side + patch_Q % POOL
        inside_QH = (patch_Q < POOL * POOL)[:, None] & (column_H < hidden)[None, :]
        x_QH = tl.load(x_ptr + row_Q[:, None] * hidden + column_H[None, :], inside_QH, other=0.0)
        sum_H += tl.sum(x_QH.to(tl.float32), 0)
    mean_H = (sum_H * (1.0 / (POOL * POOL))).to(y_ptr.dtype.element_ty).to(tl.float32)
    y_H = mean_H * tl.rsqrt(tl.sum(mean_H * mean_H, 0) / hidden + eps) * scale_H
    tl.store(y_ptr + token.to(tl.int64) * hidden + column_H, y_H.to(y_ptr.dtype.element_ty), column_H < hidden)


def pool_norm(x_NPH: Tensor, scale_H: Tensor, pool: int, *, config: Config | None = None) -> Tensor:
    """Pools and normalises: [N, P, H] to [N, T, H].

    Args:
        x_NPH: bf16 or fp32; P is a square number, and ``pool`` divides its root.
        scale_H: fp32, 1 + w.
        config: None takes the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    images, patches, hidden = x_NPH.shape
    side = math.isqrt(patches)
    if pool < 1 or side * side != patches or side % pool:
        raise UsageError(f"x must hold a square of patches whose side is a multiple of {pool}, but holds {patches}")
    y_NTH = torch.empty(images, patches // pool**2, hidden, dtype=x_NPH.dtype, device=x_NPH.device)
    check_tensor("x", x_NPH, shape=x_NPH.shape, dtypes=_FLOATS, device=x_NPH.device)
    check_tensor("scale", scale_H, shape=(hidden,), dtypes=(torch.float32,), device=x_NPH.device)
    _launch(config or _default(hidden), x_NPH, scale_H, y_NTH, pool).run()
    return y_NTH


def _launch(config: Config, x_NPH: Tensor, scale_H: Tensor, y_NTH: Tensor, pool: int) -> Launch:
    images, tokens, hidden = y_NTH.shape
    return Launch(
        function=_pool_norm_kernel,
        grid=(images * tokens, 1, 1),
        arguments={
            "x_ptr": x_NPH,
            "scale_ptr": scale_H,
            "y_ptr": y_NTH,
            "side": math.isqrt(x_NPH.shape[1]),
            "hidden": hidden,
            "eps": EPS,
        },
        constants=dict(config.constants) | {"POOL": pool, "BLOCK_H": triton.next_power_of_2(hidden)},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        dependent=bool(config.constants["DEPENDENT"]),
    )


def _default(hidden: int, dependent: int = 0) -> Config:
    constants = {"BLOCK_PATCHES": 4, "DEPENDENT": dependent}
    return Config(constants=constants, num_warps=8 if hidden > 512 else 4, num_stages=1)


class PoolNorm(Kernel):
    """``side`` patches along an edge of the picture, ``pool`` along an edge of a square."""

    name: ClassVar[str] = "siglip_pool"
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float32")
    stages: ClassVar[tuple[Stage, ...]] = ("vision",)
    source: ClassVar[tuple[str, ...]] = ("autotune.kernels.pool_norm",)

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage != "vision" or model.vision is None:
            return ()
        side = math.isqrt(model.vision.patches)
        pool = side // math.isqrt(model.vision.tokens)
        dims = {"images": batch, "side": side, "pool": pool, "hidden": model.vision.hidden}
        case = Case(dtype=dtype if dtype in self.dtypes else "bfloat16", dims=dims)
        return (Use(name="pooling", case=case, count=1),)

    def bucket(self, case: Case) -> str:
        images = triton.next_power_of_2(case.dims["images"])
        return f"{case.dtype} images<={min(images, 16)} pool={case.dims['pool']} hidden={case.dims['hidden']}"

    def space(self, case: Case) -> Space:
        constants = {"BLOCK_PATCHES": (1, 2, 4, 8, 16), "DEPENDENT": (0, 1)}
        return Space(constants=constants, num_warps=(2, 4, 8, 16), num_stages=(1,))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        tile = config.constants["BLOCK_PATCHES"] * triton.next_power_of_2(case.dims["hidden"])
        if tile // (32 * config.num_warps) > 128:
            return f"{tile} values in {config.num_warps} warps take more than 128 registers a thread"
        return dependent_refusal(config.constants["DEPENDENT"], gpu)

    def default(self, case: Case, gpu: Gpu) -> Config:
        return _default(case.dims["hidden"], best_dependent(gpu))

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        draw, dtype, hidden = Draw(device, seed), getattr(torch, case.dtype), case.dims["hidden"]
        x = draw.normal(case.dims["images"], case.dims["side"] ** 2, hidden, dtype=dtype, deviation=3)
        return {"x": x, "scale": draw.scale(hidden)}

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        shape = (case.dims["images"], (case.dims["side"] // case.dims["pool"]) ** 2, case.dims["hidden"])
        return {"y": torch.empty(shape, dtype=getattr(torch, case.dtype), device=device)}

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        return (_launch(config, tensors["x"], tensors["scale"], tensors["y"], case.dims["pool"]),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        return {"y": siglip_pool_oracle(inputs["x"], inputs["scale"], case.dims["pool"], EPS).contiguous()}

    def cost(self, case: Case) -> Cost:
        width = getattr(torch, case.dtype).itemsize
        patches = case.dims["images"] * case.dims["side"] ** 2
        tokens = patches // case.dims["pool"] ** 2
        hidden = case.dims["hidden"]
        return Cost(bytes=(patches + tokens) * hidden * width + 4 * hidden, flops=(patches + 4 * tokens) * hidden)
