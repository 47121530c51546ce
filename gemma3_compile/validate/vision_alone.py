"""Each part of the vision tower alone, over the bundle's own residual stream.

Legend: N images, P patches (p a side), H hidden of the tower, T tokens an image, X hidden of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3_compile.model.vision import VisionLayer, VisionMLP
from gemma3_compile.validate.drift import Drift, drift
from gemma3_compile.validate.explain import Trial, best
from gemma3_compile.validate.layers_alone import Place
from gemma3_compile.validate.probes import Array, Probed
from gemma3_compile.validate.vision_calls import (
    PatchCall,
    PoolCall,
    VisionLayerCall,
    patch_call,
    pool_call,
    vision_layer_call,
)
from gemma3_compile.validate.weights import Weights
from runtimes.progress import SILENT, Progress

STAGE = "vision"


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionSite:
    """A right call of a layer; ``patches`` is what made its input, for the first layer only."""

    call: VisionLayerCall
    patches: PatchCall | None


@dataclass(frozen=True, kw_only=True)
class VisionHypothesis:
    """A possible fault before or in a layer. ``vary`` gives the faulty call, or None where it cannot be."""

    cause: str
    sentence: str
    vary: Callable[[VisionSite], VisionLayerCall | None]


@dataclass(frozen=True, kw_only=True)
class PoolHypothesis:
    """A possible fault after the layers."""

    cause: str
    sentence: str
    vary: Callable[[PoolCall], PoolCall]


def _patches(change: Callable[[PatchCall], PatchCall]) -> Callable[[VisionSite], VisionLayerCall | None]:
    def vary(site: VisionSite) -> VisionLayerCall | None:
        return None if site.patches is None else replace(site.call, x_NPH=change(site.patches).run())

    return vary


def _positions_transposed(call: PatchCall) -> PatchCall:
    assert call.position_PH is not None
    side = round(call.position_PH.shape[0] ** 0.5)
    return replace(call, position_PH=call.position_PH.view(side, side, -1).transpose(0, 1).flatten(0, 1))


class _OtherMLP(nn.Module):
    """The feed-forward of ``mlp`` with the exact form of GELU."""

    def __init__(self, mlp: VisionMLP) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x_NPH: Tensor) -> Tensor:
        out_NPH: Tensor = self.mlp.fc2(F.gelu(self.mlp.fc1(x_NPH)))
        return out_NPH


def _exact_gelu(site: VisionSite) -> VisionLayerCall:
    def edit(layer: VisionLayer) -> None:
        layer.add_module("mlp", _OtherMLP(layer.mlp))

    return replace(site.call, edit=edit)


def _unscaled(site: VisionSite) -> VisionLayerCall:
    """Products of queries and keys without 1 / sqrt(head size)."""
    root = float((site.call.config.hidden_size / site.call.config.num_heads) ** 0.5)
    return site.call.with_weight(lambda w: w * root, "self_attn.q_proj.weight", "self_attn.q_proj.bias")


LAYER: tuple[VisionHypothesis, ...] = (
    VisionHypothesis(
        cause="position embedding",
        sentence="the patches' position embedding is left out",
        vary=_patches(lambda call: replace(call, position_PH=None)),
    ),
    VisionHypothesis(
        cause="position embedding",
        sentence="the position embedding runs down the columns instead of along the rows",
        vary=_patches(_positions_transposed),
    ),
    VisionHypothesis(
        cause="patch embedding",
        sentence="the bias of the patch embedding is left out",
        vary=_patches(lambda call: replace(call, bias_H=torch.zeros_like(call.bias_H))),
    ),
    VisionHypothesis(
        cause="patch embedding",
        sentence="the picture is taken with its axes swapped",
        vary=_patches(lambda call: replace(call, pixels_N3YX=call.pixels_N3YX.transpose(2, 3))),
    ),
    VisionHypothesis(
        cause="patch embedding",
        sentence="the picture's channels are taken in reverse order, blue before red",
        vary=_patches(lambda call: replace(call, pixels_N3YX=call.pixels_N3YX.flip(1))),
    ),
    VisionHypothesis(cause="activation", sentence="GELU is the exact form instead of tanh", vary=_exact_gelu),
    VisionHypothesis(cause="attention scale", sentence="products of queries and keys are not scaled", vary=_unscaled),
)

POOL: tuple[PoolHypothesis, ...] = (
    PoolHypothesis(
        cause="norm (1 + w)",
        sentence="the norm after pooling multiplies by w instead of 1 + w",
        vary=lambda call: replace(call, scale_H=call.scale_H - 1.0),
    ),
    PoolHypothesis(
        cause="norm left out",
        sentence="the tower's last LayerNorm is left out",
        vary=lambda call: replace(call, norm=None),
    ),
    PoolHypothesis(
        cause="pooling",
        sentence="patches are pooled column by column instead of row by row",
        vary=lambda call: replace(call, transposed=True),
    ),
)


def check_vision(weights: Weights, probed: Probed, pixels_N3YX: Array, progress: Progress = SILENT) -> list[Place]:
    """Every layer of the tower, and pooling with its projection, in order."""
    after, features_NTX = probed.run_vision(pixels_N3YX)
    patches = patch_call(weights, torch.from_numpy(pixels_N3YX))
    places, x_NPH = [], patches.run()
    with progress.task("each vision layer alone", total=len(after)) as advance:
        for index, actual in enumerate(after):
            actual_NPH = torch.from_numpy(actual)
            site = VisionSite(call=vision_layer_call(weights, index, x_NPH), patches=None if index else patches)
            places.append(_check_layer(index, site, actual_NPH))
            x_NPH = actual_NPH
            advance(1)
    places.append(_check_pool(pool_call(weights, x_NPH), torch.from_numpy(features_NTX)))
    return places


def _check_layer(index: int, site: VisionSite, actual_NPH: Tensor) -> Place:
    right, before = site.call, site.call.x_NPH
    expected_NPH = _by_picture(right)
    errors = drift(before, expected_NPH, actual_NPH)
    pictures, patches = actual_NPH.shape[:2]
    nothing = np.zeros(errors.shape, dtype=np.bool_)
    found = Drift(
        errors=errors,
        positions=np.tile(np.arange(patches), pictures),
        is_image=nothing,
        first_chunk=~nothing,
        finite=bool(actual_NPH.isfinite().all()),
    )
    place = Place(stage=STAGE, index=index, kind="vision", error=found.worst, tokens=len(errors), found=found)
    if place.sound or not np.isfinite(place.error):
        return place
    trials = []
    for hypothesis in LAYER:
        varied = hypothesis.vary(site)
        if varied is not None:
            shifted_NPH = expected_NPH + (actual_NPH - _by_picture(varied))
            error = float(drift(before, expected_NPH, shifted_NPH).max())
            trials.append(Trial(hypothesis.cause, hypothesis.sentence, error, hypothesis))
    return replace(place, explanation=best(trials, place.error))


def _by_picture(call: VisionLayerCall) -> Tensor:
    """A picture at a time: attention over 4096 patches takes much memory."""
    return torch.cat([replace(call, x_NPH=x_PH[None]).run() for x_PH in call.x_NPH])


def _check_pool(call: PoolCall, actual_NTX: Tensor) -> Place:
    expected_NTX = call.run()
    largest = float(expected_NTX.abs().max())

    def error_of(varied: PoolCall) -> float:
        error = float((varied.run() - actual_NTX).abs().max()) / largest
        return error if np.isfinite(error) else float("inf")

    place = Place(
        stage=STAGE, index=None, kind="pooling", error=error_of(call), tokens=int(np.prod(actual_NTX.shape[:2]))
    )
    if place.sound:
        return place
    return replace(place, explanation=best(list(_pool_trials(call, error_of)), place.error))


def _pool_trials(call: PoolCall, error_of: Callable[[PoolCall], float]) -> Iterator[Trial]:
    for hypothesis in POOL:
        yield Trial(hypothesis.cause, hypothesis.sentence, error_of(hypothesis.vary(call)), hypothesis)
