"""The vision tower of the eager model in three kinds of call: before the layers, a layer, after the layers.

Legend: N images, P patches (p a side), H hidden of the tower, T tokens an image, X hidden of the decoder.

As ``calls.py`` for the decoder: plain frozen data that a hypothesis varies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma3_compile.config import VisionConfig
from gemma3_compile.model.vision import VisionLayer
from gemma3_compile.validate.weights import Weights, fill
from graphs import ops


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchCall:
    """Patches and their positions. ``position_PH`` None leaves the positions out (a fault)."""

    pixels_N3YX: Tensor
    weight: Tensor
    bias_H: Tensor
    position_PH: Tensor | None

    def run(self) -> Tensor:
        """The residual stream [N, P, H] before the first layer."""
        x_NHpp = F.conv2d(
            self.pixels_N3YX.to(self.weight.dtype), self.weight, self.bias_H, stride=self.weight.shape[-1]
        )
        x_NPH = x_NHpp.flatten(2).transpose(1, 2)
        return x_NPH if self.position_PH is None else x_NPH + self.position_PH


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionLayerCall:
    """One layer of the tower. ``edit`` is given the module before it runs."""

    config: VisionConfig
    weights: Mapping[str, Tensor]
    x_NPH: Tensor
    edit: Callable[[VisionLayer], None] | None = None

    def run(self) -> Tensor:
        """The residual stream [N, P, H] after the layer."""
        with torch.device("meta"):
            layer = VisionLayer(self.config)
        fill(layer, self.weights)
        if self.edit is not None:
            self.edit(layer)
        out_NPH: Tensor = layer(self.x_NPH)
        return out_NPH

    def with_weight(self, change: Callable[[Tensor], Tensor], *names: str) -> VisionLayerCall:
        """The call with ``change`` applied to some weights."""
        return replace(self, weights={**self.weights, **{name: change(self.weights[name]) for name in names}})


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolCall:
    """The last LayerNorm, pooling, RMSNorm and the projection.

    ``norm`` holds weight and bias of the LayerNorm; None leaves it out (a fault). ``scale_H`` is the whole
    factor of the RMSNorm, 1 + w. ``transposed`` takes the patches column by column (a fault).
    """

    config: VisionConfig
    norm: tuple[Tensor, Tensor] | None
    scale_H: Tensor
    projection_HX: Tensor
    x_NPH: Tensor
    transposed: bool = False

    def run(self) -> Tensor:
        """Image features [N, T, X]."""
        x_NPH, eps = self.x_NPH, self.config.layer_norm_eps
        if self.norm is not None:
            x_NPH = F.layer_norm(x_NPH, (x_NPH.shape[-1],), *self.norm, eps)
        if self.transposed:
            side = self.config.patches_per_side
            x_NPH = x_NPH.view(len(x_NPH), side, side, -1).transpose(1, 2).flatten(1, 2)
        pooled_NTH: Tensor = ops.siglip_pool(x_NPH, self.scale_H, self.config.pool, eps)
        return pooled_NTH @ self.projection_HX


def patch_call(weights: Weights, pixels_N3YX: Tensor) -> PatchCall:
    """The right call before the layers."""
    return PatchCall(
        pixels_N3YX=pixels_N3YX,
        weight=weights.read("vision.patch_embedding.weight"),
        bias_H=weights.read("vision.patch_embedding.bias"),
        position_PH=weights.read("vision.position_embedding.weight"),
    )


def vision_layer_call(weights: Weights, index: int, x_NPH: Tensor) -> VisionLayerCall:
    """The right call of layer ``index``."""
    config = weights.config.vision
    assert config is not None
    with torch.device("meta"):
        names = VisionLayer(config).state_dict().keys()
    return VisionLayerCall(config=config, weights=weights.read_all(names, f"vision.layers.{index}."), x_NPH=x_NPH)


def pool_call(weights: Weights, x_NPH: Tensor) -> PoolCall:
    """The right call after the layers."""
    config = weights.config.vision
    assert config is not None
    return PoolCall(
        config=config,
        norm=(weights.read("vision.post_layernorm.weight"), weights.read("vision.post_layernorm.bias")),
        scale_H=1.0 + weights.read("vision.soft_emb_norm.weight"),
        projection_HX=weights.read("vision.input_projection.weight"),
        x_NPH=x_NPH,
    )


def features_of(weights: Weights, pixels_N3YX: Tensor) -> Tensor:
    """Image features [N, T, X] of the whole tower, a picture at a time through each layer."""
    config = weights.config.vision
    assert config is not None
    x_NPH = patch_call(weights, pixels_N3YX).run()
    for index in range(config.num_layers):
        call = vision_layer_call(weights, index, x_NPH)
        x_NPH = torch.cat([replace(call, x_NPH=x_PH[None]).run() for x_PH in x_NPH])
    return pool_call(weights, x_NPH).run()
