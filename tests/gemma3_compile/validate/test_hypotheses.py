"""Every hypothesis can be told from the right call and from every other: none names another's fault."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma3_compile.config import ModelConfig
from gemma3_compile.facts import model_facts
from gemma3_compile.model import Gemma3
from gemma3_compile.validate import hypotheses, vision_alone
from gemma3_compile.validate.calls import Embedding, layer_call, layer_weights
from gemma3_compile.validate.cases import image_cases
from gemma3_compile.validate.drift import drift
from gemma3_compile.validate.end_to_end import pieces_of
from gemma3_compile.validate.explain import Trial, best
from gemma3_compile.validate.hypotheses import HEAD, LAYER, Hypothesis, Site
from gemma3_compile.validate.tolerances import GRAPH
from gemma3_compile.validate.vision_calls import patch_call, pool_call, vision_layer_call
from gemma3_compile.validate.weights import Weights

LIMIT = GRAPH.relative or 0.0


class ModelWeights(Weights):
    """The tensors of an eager model."""

    def __init__(self, model: Gemma3) -> None:
        self.config, self.label = model.config, "eager"
        self._tensors = dict(model.named_parameters())

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().clone()


@pytest.fixture(scope="module")
def weights(nano_model: Gemma3) -> Weights:
    return ModelWeights(nano_model)


def site_of(weights: Weights, index: int) -> Site:
    """Layer ``index`` over a passage with two pictures, some tokens past the window."""
    config: ModelConfig = weights.config
    facts = model_facts(config, None)
    generator = np.random.default_rng(1)
    passage = image_cases(facts, lambda count: generator.integers(4, 490, size=count))[1].passages[0]
    assert facts.image is not None
    features_MH = torch.randn(2 * facts.image.tokens_per_image, config.text.hidden_size)
    embedding = Embedding(weights).lookup(
        torch.from_numpy(passage.token_ids), features_MH, torch.from_numpy(passage.feature_rows())
    )
    call = layer_call(config.text, index, layer_weights(weights, index), pieces_of(passage, embedding.run()))
    return Site(call=call, embedding=embedding if index == 0 else None)


def outcomes(site: Site) -> dict[Hypothesis, Tensor]:
    """What every hypothesis that applies makes of the layer."""
    calls = {hypothesis: hypothesis.vary(site) for hypothesis in LAYER}
    return {hypothesis: torch.cat(call.run()) for hypothesis, call in calls.items() if call is not None}


@pytest.mark.parametrize("index", [0, 5])
def test_a_layers_hypotheses_are_told_apart(weights: Weights, index: int) -> None:
    torch.manual_seed(0)
    site = site_of(weights, index)
    before = torch.cat([piece.x_SH for piece in site.call.pieces])
    right = torch.cat(site.call.run())
    found = outcomes(site)
    for planted, actual in found.items():
        error = float(drift(before, right, actual).max())
        assert error > LIMIT, f"{planted.sentence}: differs from the right call by {error:.2g} only"
        trials = [
            Trial(h.cause, h.sentence, float(drift(before, right, right + (actual - varied)).max()), h)
            for h, varied in found.items()
        ]
        chosen = best(trials, error)
        assert chosen is not None and chosen.hypothesis is planted, f"{planted.sentence}: named {chosen}"


def test_every_hypothesis_applies_somewhere(weights: Weights) -> None:
    """Three rows need a site that nano is not: another attention scale, an odd embedding scale, a short window."""
    local = site_of(weights, 0)
    config = replace(local.call.config, query_pre_attn_scalar=100, sliding_window=10)
    assert local.embedding is not None
    odd = Site(call=replace(local.call, config=config), embedding=replace(local.embedding, scale=640**0.5))
    sites = [local, site_of(weights, 5), odd]
    for hypothesis in LAYER:
        assert any(hypothesis.vary(site) is not None for site in sites), hypothesis.sentence


def test_the_heads_hypotheses_are_told_apart(weights: Weights) -> None:
    call = Embedding(weights).head(torch.randn(6, weights.config.text.hidden_size) * 3)
    call = replace(call, table_VH=call.table_VH * 10)  # logits large enough for a cap to show
    right, largest = call.run(), float(call.run().abs().max())
    for planted in HEAD:
        actual = planted.vary(call).run()
        trials = [
            Trial(h.cause, h.sentence, float((h.vary(call).run() - actual).abs().max()) / largest, h) for h in HEAD
        ]
        chosen = best(trials, 1.0)
        assert float((actual - right).abs().max()) / largest > LIMIT, planted.sentence
        assert chosen is not None and chosen.hypothesis is planted, planted.sentence


def test_the_towers_hypotheses_are_told_apart(weights: Weights) -> None:
    config = weights.config.vision
    assert config is not None
    pixels = torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    patches = patch_call(weights, pixels)
    before = patches.run()
    site = vision_alone.VisionSite(call=vision_layer_call(weights, 0, before), patches=patches)
    right = site.call.run()
    found = {h: call.run() for h in vision_alone.LAYER if (call := h.vary(site)) is not None}
    assert len(found) == len(vision_alone.LAYER)
    for planted, actual in found.items():
        trials = [
            Trial(h.cause, h.sentence, float(drift(before, right, right + (actual - varied)).max()), h)
            for h, varied in found.items()
        ]
        chosen = best(trials, 1.0)
        error = float(drift(before, right, actual).max())
        assert error > LIMIT, f"{planted.sentence}: {error:.2g}"
        assert chosen is not None and chosen.hypothesis is planted, planted.sentence


def test_the_poolings_hypotheses_are_told_apart(weights: Weights) -> None:
    config = weights.config.vision
    assert config is not None
    x = torch.randn(2, config.patches_per_side**2, config.hidden_size, generator=torch.Generator().manual_seed(0))
    call = pool_call(weights, x)
    largest = float(call.run().abs().max())
    for planted in vision_alone.POOL:
        actual = planted.vary(call).run()
        assert float((actual - call.run()).abs().max()) / largest > LIMIT, planted.sentence
        trials = [
            Trial(h.cause, h.sentence, float((h.vary(call).run() - actual).abs().max()) / largest, h)
            for h in vision_alone.POOL
        ]
        chosen = best(trials, 1.0)
        assert chosen is not None and chosen.hypothesis is planted, planted.sentence


def test_norm_names_are_those_of_the_layer(weights: Weights) -> None:
    names = {name.removesuffix(".weight") for name in layer_weights(weights, 0) if "norm" in name}
    assert names == set(hypotheses.NORMS)
