"""SigLIP's patch embedding: a convolution whose stride is its width, as a product that gathers pixels while it runs.

Legend: N images, Y and X pixels of an edge, P patches of an image, H hidden, K = 3 x patch x patch pixels of a patch;
in the kernel, those of a tile (P counts the patches of all images).

    y = pixels_PK @ weight_HK^T + bias + position_PH

No [P, K] matrix is ever written: pixel k of patch p lies at a place that is a sum of one term in p and one in k. Sums
and the bias are fp32; the convolution is rounded before the position is added, as transformers stores it. Tiles that
share pixels run side by side, so that pixels come from memory once and from the L2 cache after that.

Source: SigLIP (arXiv 2303.15343); transformers' ``SiglipVisionEmbeddings``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.draw import Draw
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.dependent import best_dependent, dependent_refusal, release, wait
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor
from runtimes.errors import UsageError

CHANNELS = 3
_FLOATS = (torch.float32, torch.bfloat16)


def patch_embed_oracle(pixels_NCYX: Tensor, weight_HCyx: Tensor, bias_H: Tensor, position_PH: Tensor) -> Tensor:
    """The torch oracle: [N, P, H] in the dtype of the weight, which pixels are rounded to.

    A product rather than a convolution: cuDNN's would take TF32 for fp32.
    """
    images, _, size, _ = pixels_NCYX.shape
    patch = weight_HCyx.shape[-1]
    side = size // patch
    pixels_NCYyXx = pixels_NCYX.to(weight_HCyx.dtype).view(images, CHANNELS, side, patch, side, patch)
    pixels_NPK = pixels_NCYyXx.permute(0, 2, 4, 1, 3, 5).reshape(images, side * side, -1)
    return torch.nn.functional.linear(pixels_NPK, weight_HCyx.flatten(1), bias_H) + position_PH


@triton.jit
def _patch_embed_kernel(
    pixels_ptr, weight_ptr, bias_ptr, position_ptr, y_ptr, images, hidden,
    SIZE: tl.constexpr, PATCH: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    release(DEPENDENT)
    wait(DEPENDENT)
    SIDE: tl.constexpr = SIZE // PATCH
    DEPTH: tl.constexpr = CHANNELS * PATCH * PATCH
    stored = weight_ptr.dtype.element_ty
    patch_P = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    column_H = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_P = patch_P < images * (SIDE * SIDE)
    place_P = patch_P % (SIDE * SIDE)
    corner_P = place_P // SIDE * (PATCH * SIZE) + place_P % SIDE * PATCH
    pixels_P_ptr = pixels_ptr + (patch_P // (SIDE * SIDE)).to(tl.int64) * (CHANNELS * SIZE * SIZE) + corner_P
    weight_H_ptr = weight_ptr + column_H * DEPTH
    sum_PH = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    for begin in tl.range(0, DEPTH, BLOCK_K):
        k_K = begin + tl.arange(0, BLOCK_K)
        pixel_K = k_K // (PATCH * PATCH) * (SIZE * SIZE) + k_K // PATCH % PATCH * SIZE + k_K % PATCH
        inside_PK = inside_P[:, None] & (k_K < DEPTH)[None, :]
        inside_KH = (k_K < DEPTH)[:, None] & (column_H < hidden)[None, :]
        pixels_PK = tl.load(pixels_P_ptr[:, None] + pixel_K[None, :], inside_PK, other=0.0).to(stored)
        weight_KH = tl.load(weight_H_ptr[None, :] + k_K[:, None], inside_KH, other=0.0)
        sum_PH = tl.dot(pixels_PK, weight_KH, sum_PH, input_precision="ieee")
    bias_H = tl.load(bias_ptr + column_H, column_H < hidden, other=0.0).to(tl.float32)
    x_PH = (sum_PH + bias_H[None, :]).to(stored).to(tl.float32)
    inside_PH = inside_P[:, None] & (column_H < hidden)[None, :]
    position_PH_ptr = position_ptr + place_P[:, None] * hidden + column_H[None, :]
    position_PH = tl.load(position_PH_ptr, inside_PH, other=0.0).to(tl.float32)
    y_PH_ptr = y_ptr + patch_P.to(tl.int64)[:, None] * hidden + column_H[None, :]
    tl.store(y_PH_ptr, (x_PH + position_PH).to(stored), inside_PH)


def patch_embed(
    pixels_NCYX: Tensor, weight_HCyx: Tensor, bias_H: Tensor, position_PH: Tensor, *, config: Config | None = None
) -> Tensor:
    """Pictures to embedded patches: [N, 3, size, size] to [N, P, H].

    Args:
        pixels_NCYX: normalised, fp32 or bf16.
        weight_HCyx: [H, 3, patch, patch], bf16 or fp32; bias [H] and position [P, H] have its dtype.
        config: None takes the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    images, _, size, _ = pixels_NCYX.shape
    hidden, _, patch, _ = weight_HCyx.shape
    if size % patch:
        raise UsageError(f"patches of {patch} pixels do not divide pictures of {size} x {size}")
    side, device, floats = size // patch, pixels_NCYX.device, (weight_HCyx.dtype,)
    y_NPH = torch.empty(images, side * side, hidden, dtype=weight_HCyx.dtype, device=device)
    check_tensor("pixels", pixels_NCYX, shape=(images, CHANNELS, size, size), dtypes=_FLOATS, device=device)
    check_tensor("weight", weight_HCyx, shape=(hidden, CHANNELS, patch, patch), dtypes=_FLOATS, device=device)
    check_tensor("bias", bias_H, shape=(hidden,), dtypes=floats, device=device)
    check_tensor("position", position_PH, shape=(side * side, hidden), dtypes=floats, device=device)
    chosen = config or _default(weight_HCyx.dtype)
    _launch(chosen, pixels_NCYX, weight_HCyx, bias_H, position_PH, y_NPH).run()
    return y_NPH


def _launch(
    config: Config, pixels_NCYX: Tensor, weight_HCyx: Tensor, bias_H: Tensor, position_PH: Tensor, y_NPH: Tensor
) -> Launch:
    images, patches, hidden = y_NPH.shape
    columns = triton.cdiv(hidden, config.constants["BLOCK_H"])
    rows = triton.cdiv(images * patches, config.constants["BLOCK_P"])
    return Launch(
        function=_patch_embed_kernel,
        grid=(columns, rows, 1),
        arguments={
            "pixels_ptr": pixels_NCYX,
            "weight_ptr": weight_HCyx,
            "bias_ptr": bias_H,
            "position_ptr": position_PH,
            "y_ptr": y_NPH,
            "images": images,
            "hidden": hidden,
        },
        constants=dict(config.constants)
        | {"SIZE": pixels_NCYX.shape[-1], "PATCH": weight_HCyx.shape[-1], "CHANNELS": CHANNELS},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        dependent=bool(config.constants["DEPENDENT"]),
    )


def _default(dtype: torch.dtype, dependent: int = 0) -> Config:
    if dtype == torch.float32:  # no matrix units: small tiles keep the sums in registers
        constants = {"BLOCK_P": 32, "BLOCK_H": 64, "BLOCK_K": 16, "DEPENDENT": dependent}
        return Config(constants=constants, num_warps=4, num_stages=2)
    constants = {"BLOCK_P": 64, "BLOCK_H": 128, "BLOCK_K": 32, "DEPENDENT": dependent}
    return Config(constants=constants, num_warps=4, num_stages=3)


class PatchEmbed(Kernel):
    """``size`` pixels an edge, ``patch`` pixels a patch; ``wide`` 1 where pixels are fp32 beside bf16 weights."""

    name: ClassVar[str] = "patch_embed"
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float32")
    stages: ClassVar[tuple[Stage, ...]] = ("vision",)
    source: ClassVar[tuple[str, ...]] = ("autotune.kernels.patch_embed",)

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage != "vision" or model.vision is None:
            return ()
        v = model.vision
        dims = {"images": batch, "size": v.image_size, "patch": v.patch_size, "hidden": v.hidden, "wide": 1}
        case = Case(dtype=dtype if dtype in self.dtypes else "bfloat16", dims=dims)
        return (Use(name="patch embedding", case=case, count=1),)

    def bucket(self, case: Case) -> str:
        d = case.dims
        images = min(triton.next_power_of_2(d["images"]), 16)
        return (
            f"{case.dtype} images<={images} size={d['size']} patch={d['patch']} hidden={d['hidden']} wide={d['wide']}"
        )

    def space(self, case: Case) -> Space:
        return Space(
            constants={
                "BLOCK_P": (32, 64, 128),
                "BLOCK_H": (64, 128, 256),
                "BLOCK_K": (16, 32, 64),
                "DEPENDENT": (0, 1),
            },
            num_warps=(4, 8),
            num_stages=(1, 2, 3, 4),
        )

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        rows, columns, depth = (config.constants[name] for name in ("BLOCK_P", "BLOCK_H", "BLOCK_K"))
        if rows * columns // (32 * config.num_warps) > 128:
            return f"sums of {rows} x {columns} in {config.num_warps} warps take more than 128 registers a thread"
        weights = getattr(torch, case.dtype).itemsize
        pixels = 4 if case.dims["wide"] else weights
        # One stage less than asked for waits in shared memory; the tiles being multiplied lie there besides.
        waiting = (config.num_stages - 1) * depth * (rows * pixels + columns * weights)
        shared = max(waiting + depth * (rows + columns) * weights, rows * columns * weights) + 256
        if shared > gpu.shared_bytes:
            return f"{shared} bytes of shared memory, and {gpu.name} has {gpu.shared_bytes}"
        return dependent_refusal(config.constants["DEPENDENT"], gpu)

    def default(self, case: Case, gpu: Gpu) -> Config:
        return _default(getattr(torch, case.dtype), best_dependent(gpu))

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        images, size, patch, hidden = (case.dims[name] for name in ("images", "size", "patch", "hidden"))
        draw, floats = Draw(device, seed), getattr(torch, case.dtype)
        pixels = draw.normal(images, CHANNELS, size, size, deviation=1 / 3).clamp_(-1, 1)
        fan_in = CHANNELS * patch * patch
        return {
            "pixels": pixels.to(torch.float32 if case.dims["wide"] else floats),
            "weight": draw.normal(hidden, CHANNELS, patch, patch, dtype=floats, deviation=fan_in**-0.5),
            "bias": draw.normal(hidden, dtype=floats),
            "position": draw.normal((size // patch) ** 2, hidden, dtype=floats),
        }

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        shape = (case.dims["images"], (case.dims["size"] // case.dims["patch"]) ** 2, case.dims["hidden"])
        return {"y": torch.empty(shape, dtype=getattr(torch, case.dtype), device=device)}

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        t = tensors
        return (_launch(config, t["pixels"], t["weight"], t["bias"], t["position"], t["y"]),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        args = (inputs["pixels"], inputs["weight"], inputs["bias"], inputs["position"])
        return {"y": patch_embed_oracle(*args)}

    def cost(self, case: Case) -> Cost:
        images, size, patch, hidden = (case.dims[name] for name in ("images", "size", "patch", "hidden"))
        width = getattr(torch, case.dtype).itemsize
        patches, depth = (size // patch) ** 2, CHANNELS * patch * patch
        pixels = images * CHANNELS * size * size * (4 if case.dims["wide"] else width)
        read = (depth * hidden + hidden + patches * hidden) * width
        return Cost(
            bytes=pixels + read + images * patches * hidden * width, flops=2 * images * patches * depth * hidden
        )
