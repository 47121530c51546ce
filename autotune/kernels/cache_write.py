"""A chunk's keys and values into the ring of a local layer, once its attention has read the old ones.

Legend: B batch, S tokens of the chunk, G key-value heads, D head_dim, W window, R rows of a program.

    cache[(start + s) mod W] = chunk[s]    for the last min(length, W) of the ``length`` real tokens

Rows that a later one of the chunk would overwrite, and padding, are never read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotune.draw import Draw
from autotune.gpu import Gpu
from autotune.kernel import Case, Config, Cost, Kernel, Space, Stage, Tensors, Use
from autotune.kernels.cache_layout import kept_rows_BC, take_rows
from autotune.kernels.dependent import best_dependent, dependent_refusal, release, wait
from autotune.launch import Launch
from autotune.model_shapes import ModelShapes
from autotune.tensor_checks import check_tensor


def cache_write_oracle(rows_BSGD: Tensor, cache_BGWD: Tensor, start_B: Tensor, length_B: Tensor) -> Tensor:
    """The torch oracle: a new cache. Where no position reaches W, that is a linear cache too."""
    window = cache_BGWD.shape[2]
    both_BGLD = torch.cat([cache_BGWD, rows_BSGD.transpose(1, 2)], dim=2)
    return take_rows(both_BGLD, kept_rows_BC(start_B.long(), length_B.long(), window, window, "ring"))


@triton.jit
def _cache_write_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, start_ptr, length_ptr, tokens, window,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release(DEPENDENT)
    wait(DEPENDENT)
    sequence = tl.program_id(2)
    length = tl.load(length_ptr + sequence)
    kept = tl.minimum(length, window)
    first = tl.program_id(0) * BLOCK_ROWS
    if first >= kept:
        return
    row_R = first + tl.arange(0, BLOCK_ROWS)
    inside_R1 = (row_R < kept)[:, None]
    step_R = length - kept + row_R
    slot_R = (tl.load(start_ptr + sequence) + step_R) % window
    dim_1D = tl.arange(0, HEAD_DIM)[None, :]
    sequence = sequence.to(tl.int64)
    head = tl.program_id(1)
    from_RD = ((sequence * tokens + step_R) * KV_HEADS + head)[:, None] * HEAD_DIM + dim_1D
    to_RD = ((sequence * KV_HEADS + head) * window + slot_R)[:, None] * HEAD_DIM + dim_1D
    k_RD = tl.load(k_ptr + from_RD, inside_R1)
    v_RD = tl.load(v_ptr + from_RD, inside_R1)
    tl.store(k_cache_ptr + to_RD, k_RD, inside_R1)
    tl.store(v_cache_ptr + to_RD, v_RD, inside_R1)


def cache_write_(
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    k_cache_BGWD: Tensor,
    v_cache_BGWD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    *,
    config: Config | None = None,
) -> None:
    """Writes both rings in place.

    Args:
        k_BSGD, v_BSGD: bf16, keys normed and rotated.
        k_cache_BGWD, v_cache_BGWD: bf16 rings.
        start_B: int32, position of the chunk's first token in each sequence.
        length_B: int32, how many of the S tokens are real; 0 leaves a sequence's ring as it is.
        config: None takes the heuristic.

    Raises:
        UsageError: a shape, dtype or device that does not fit.
    """
    batch, _, kv_heads, head_dim = k_BSGD.shape
    window = k_cache_BGWD.shape[2]
    ring = (batch, kv_heads, window, head_dim)
    for name, tensor, shape in (
        ("k", k_BSGD, k_BSGD.shape),
        ("v", v_BSGD, k_BSGD.shape),
        ("k_cache", k_cache_BGWD, ring),
        ("v_cache", v_cache_BGWD, ring),
    ):
        check_tensor(name, tensor, shape=shape, dtypes=(torch.bfloat16,), device=k_BSGD.device)
    for name, tensor in (("start", start_B), ("length", length_B)):
        check_tensor(name, tensor, shape=(batch,), dtypes=(torch.int32,), device=k_BSGD.device)
    tensors = {"k": k_BSGD, "v": v_BSGD, "k_cache": k_cache_BGWD, "v_cache": v_cache_BGWD}
    _launch(config or _default(head_dim), tensors | {"start": start_B, "length": length_B}).run()


def _launch(config: Config, tensors: Tensors) -> Launch:
    batch, tokens, kv_heads, head_dim = tensors["k"].shape
    window = tensors["k_cache"].shape[2]
    constants: dict[str, Any] = dict(config.constants) | {"KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
    arguments: dict[str, Any] = {
        f"{name}_ptr": tensors[name] for name in ("k", "v", "k_cache", "v_cache", "start", "length")
    }
    return Launch(
        function=_cache_write_kernel,
        grid=(triton.cdiv(min(tokens, window), config.constants["BLOCK_ROWS"]), kv_heads, batch),
        arguments=arguments | {"tokens": tokens, "window": window},
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        dependent=bool(config.constants["DEPENDENT"]),
    )


def _default(head_dim: int, dependent: int = 0) -> Config:
    constants = {"BLOCK_ROWS": min(64, 4096 // head_dim), "DEPENDENT": dependent}
    return Config(constants=constants, num_warps=4, num_stages=1)


class CacheWrite(Kernel):
    """Dims: ``batch``, ``tokens`` of each sequence, ``kv_heads``, ``head_dim``, ``window``."""

    name: ClassVar[str] = "cache_write"
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16",)
    stages: ClassVar[tuple[Stage, ...]] = ("prefill",)
    source: ClassVar[tuple[str, ...]] = ("autotune.kernels.cache_write",)

    def uses(self, model: ModelShapes, stage: Stage, *, batch: int, context: int, dtype: str) -> tuple[Use, ...]:
        if stage != "prefill":
            return ()
        dims = {
            "batch": batch,
            "tokens": context,
            "kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "window": model.window,
        }
        return (Use(name="local caches", case=Case(dtype="bfloat16", dims=dims), count=model.local_layers),)

    def bucket(self, case: Case) -> str:
        dims = case.dims
        rows = triton.next_power_of_2(dims["batch"] * min(dims["tokens"], dims["window"]))
        return f"{case.dtype} rows<={rows} kv_heads={dims['kv_heads']} head_dim={dims['head_dim']}"

    def space(self, case: Case) -> Space:
        constants = {"BLOCK_ROWS": (2, 4, 8, 16, 32, 64), "DEPENDENT": (0, 1)}
        return Space(constants=constants, num_warps=(1, 2, 4, 8), num_stages=(1,))

    def refusal(self, case: Case, config: Config, gpu: Gpu) -> str | None:
        values = 2 * config.constants["BLOCK_ROWS"] * case.dims["head_dim"]
        if values > 128 * 32 * config.num_warps:
            return f"{values} values in {config.num_warps} warps take more than 64 registers a thread"
        return dependent_refusal(config.constants["DEPENDENT"], gpu)

    def default(self, case: Case, gpu: Gpu) -> Config:
        return _default(case.dims["head_dim"], best_dependent(gpu))

    def inputs(self, case: Case, *, device: torch.device | str, seed: int = 0) -> Tensors:
        batch, tokens, kv_heads, head_dim, window = (
            case.dims[name] for name in ("batch", "tokens", "kv_heads", "head_dim", "window")
        )
        draw, chunk, cache = (
            Draw(device, seed),
            (batch, tokens, kv_heads, head_dim),
            (batch, kv_heads, window, head_dim),
        )
        tensors = {name: draw.normal(*chunk, dtype=torch.bfloat16) for name in ("k", "v")}
        tensors |= {name: draw.normal(*cache, dtype=torch.bfloat16) for name in ("k_cache", "v_cache")}
        length = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        return tensors | {"start": draw.integers(batch, high=3 * window), "length": length}

    def outputs(self, case: Case, config: Config, *, device: torch.device | str) -> Tensors:
        return {}

    def launches(self, case: Case, config: Config, tensors: Tensors) -> tuple[Launch, ...]:
        return (_launch(config, tensors),)

    def oracle(self, case: Case, inputs: Tensors) -> Tensors:
        return {
            f"{name}_cache": cache_write_oracle(
                inputs[name], inputs[f"{name}_cache"], inputs["start"], inputs["length"]
            )
            for name in ("k", "v")
        }

    def cost(self, case: Case) -> Cost:
        dims = case.dims
        rows = dims["batch"] * min(dims["tokens"], dims["window"]) * dims["kv_heads"]
        return Cost(bytes=2 * 2 * 2 * rows * dims["head_dim"], flops=0)
