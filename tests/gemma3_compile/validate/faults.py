"""Nano bundles with one planted fault each: the compiler is broken while it builds, the eager model is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autotune.kernels import global_attention, siglip_pool, sliding_window_attention
from gemma3_compile import stage_graphs, weights_writer
from gemma3_compile.config import ModelConfig, TextConfig
from gemma3_compile.model import Gemma3
from gemma3_compile.pipeline import BuildRequest, build
from graphs.onnx_lowering import attention_rules, ort_rules
from graphs.onnx_lowering.inline import Inliner
from graphs.passes import fold_norm_offset
from graphs.stages import Stage
from graphs.weights import Weight

Plant = Callable[[pytest.MonkeyPatch], None]
NANO_SEED = 7


def build_nano(out: Path, plant: Plant | None = None, *, stages: str = "all", **request: Any) -> Path:
    """A nano bundle; ``plant`` breaks the compiler for the time of the build. ``stages`` ``text`` leaves pictures out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_rules, "INLINER", Inliner())  # it remembers the traces of sound builds
        if stages == "text":
            whole = stage_graphs.stages_of
            patch.setattr(stage_graphs, "stages_of", lambda config: whole(config)[:1])
        if plant is not None:
            plant(patch)
        given = {"random_seed": NANO_SEED, "dtype": "float32", **request}
        return build(BuildRequest(target="ort", size="nano", out=out, **given))


def rope_factor_one(patch: pytest.MonkeyPatch) -> None:
    """Positions of global layers are not divided."""
    right = attention_rules.inverse_frequencies
    patch.setattr(attention_rules, "inverse_frequencies", lambda dim, base, factor: right(dim, base, 1.0))


def window(change: int) -> Plant:
    """The window of every local layer, one shorter or longer; the caches stay as they are."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def broken(config: ModelConfig) -> Gemma3:
            text = replace(config.text, sliding_window=config.text.sliding_window + change)
            return Gemma3(replace(config, name="custom", text=text))

        patch.setattr(stage_graphs, "Gemma3", broken)

    return plant


def causal_image_mask(patch: pytest.MonkeyPatch) -> None:
    """Tokens of a picture see only those before them."""
    local, whole = sliding_window_attention.sliding_window_attention, global_attention.attend

    def without_ids(function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def broken(*tensors: Tensor, **settings: Any) -> Any:
            given = [*tensors]
            given[place] = torch.full_like(given[place], -1)
            return function(*given, **settings)

        return broken

    patch.setattr(sliding_window_attention, "sliding_window_attention", without_ids(local, 7))
    patch.setattr(global_attention, "attend", without_ids(whole, 5))


def norm_without_one(patch: pytest.MonkeyPatch) -> None:
    """The pass that folds 1 + w into the stored weight forgets the 1."""

    def broken(weight: Weight, **changes: Any) -> Weight:
        return replace(weight, **{**changes, "offset": 0.0})

    patch.setattr(fold_norm_offset, "replace", broken)


def written_without_one(patch: pytest.MonkeyPatch) -> None:
    """The graph wants 1 + w and the ledger says so, but the writer writes w: eager and graph agree on its weights."""
    right = weights_writer.as_stored
    patch.setattr(
        weights_writer, "as_stored", lambda values, dtype: right(values - 1.0 if values.dim() == 1 else values, dtype)
    )


def unscaled_embedding(patch: pytest.MonkeyPatch) -> None:
    """Token embeddings are not multiplied."""
    patch.setattr(TextConfig, "embed_scale", 1.0)


def exact_gelu(patch: pytest.MonkeyPatch) -> None:
    """The smallest fault that is known: GELU without the tanh approximation, in decoder and tower."""
    right = F.gelu
    patch.setattr(F, "gelu", lambda x, approximate: right(x))


def transposed_pooling(patch: pytest.MonkeyPatch) -> None:
    """Patches are pooled down the columns."""
    right = siglip_pool.siglip_pool

    def broken(x_NPH: Tensor, scale_H: Tensor, *, pool: int, eps: float) -> Tensor:
        side = round(x_NPH.shape[1] ** 0.5)
        x_NPH = x_NPH.reshape(x_NPH.shape[0], side, side, x_NPH.shape[2]).transpose(1, 2).flatten(1, 2)
        return right(x_NPH, scale_H, pool=pool, eps=eps)

    patch.setattr(siglip_pool, "siglip_pool", broken)


def only_stage(name: str, plant: Plant) -> Plant:
    """``plant`` for one stage; the others are sound."""

    def planted(patch: pytest.MonkeyPatch) -> None:
        right = stage_graphs.lower_for_ort

        def broken(program: Any, options: Any) -> Any:
            stage: Stage = program.stage
            if stage.name != name:
                return right(program, options)
            with pytest.MonkeyPatch.context() as inner:
                plant(inner)
                return right(program, options)

        patch.setattr(stage_graphs, "lower_for_ort", broken)

    return planted
