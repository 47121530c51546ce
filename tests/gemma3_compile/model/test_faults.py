"""The comparisons of this folder can fail: each planted fault lies far beyond their tolerance.

A fault is planted in our model only; transformers' twin keeps the right arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gemma3_compile.config import ModelConfig, TextConfig
from gemma3_compile.model import Gemma3, decoder
from tests.tolerances import TOLERANCES, relative_error
from tests.twins import Passage, Twin, eager_logits, passage, twin_logits

Fault = Callable[[pytest.MonkeyPatch, Gemma3, Passage], tuple[Gemma3, Passage]]
FAR = 100
"""A fault must err this many times the tolerance."""


def _with_text(model: Gemma3, **text: object) -> Gemma3:
    """``model``'s weights under another text configuration."""
    config: ModelConfig = replace(model.config, name="custom", text=replace(model.config.text, **text))
    changed = Gemma3(config).eval().requires_grad_(False)
    changed.load_state_dict(model.state_dict())
    return changed


def _config(**text: object) -> Fault:
    return lambda patch, model, prompt: (_with_text(model, **text), prompt)


def _causal_images(patch: pytest.MonkeyPatch, model: Gemma3, prompt: Passage) -> tuple[Gemma3, Passage]:
    return model, replace(prompt, image_ids=torch.full_like(prompt.image_ids, -1))


def _images_merged(patch: pytest.MonkeyPatch, model: Gemma3, prompt: Passage) -> tuple[Gemma3, Passage]:
    return model, replace(prompt, image_ids=prompt.image_ids.clamp(max=0))


def _features_reversed(patch: pytest.MonkeyPatch, model: Gemma3, prompt: Passage) -> tuple[Gemma3, Passage]:
    rows = prompt.feature_rows
    return model, replace(prompt, feature_rows=torch.where(rows >= 0, rows.max() - rows, rows))


def _norm_without_one(patch: pytest.MonkeyPatch, model: Gemma3, prompt: Passage) -> tuple[Gemma3, Passage]:
    def forward(self: decoder.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)

    patch.setattr(decoder.RMSNorm, "forward", forward)
    return model, prompt


def _one_norm_without_one(patch: pytest.MonkeyPatch, model: Gemma3, prompt: Passage) -> tuple[Gemma3, Passage]:
    changed = _with_text(model)
    changed.decoder.layers[3].pre_feedforward_layernorm.weight -= 1.0
    return changed, prompt


def _embeddings_unscaled(patch: pytest.MonkeyPatch, model: Gemma3, prompt: Passage) -> tuple[Gemma3, Passage]:
    patch.setattr(TextConfig, "embed_scale", 1.0)
    return model, prompt


def _features_scaled(patch: pytest.MonkeyPatch, model: Gemma3, prompt: Passage) -> tuple[Gemma3, Passage]:
    changed = _with_text(model)
    assert changed.vision is not None
    changed.vision.input_projection.weight *= model.config.text.embed_scale
    return changed, prompt


def _exact_gelu(patch: pytest.MonkeyPatch, model: Gemma3, prompt: Passage) -> tuple[Gemma3, Passage]:
    right = F.gelu
    patch.setattr(decoder.F, "gelu", lambda x, approximate: right(x))
    return model, prompt


def _interleaved_rotation(patch: pytest.MonkeyPatch, model: Gemma3, prompt: Passage) -> tuple[Gemma3, Passage]:
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x1, x2, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, :, None], sin[:, :, None]
        return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2)

    patch.setattr(decoder.ops, "rotate", rotate)
    return model, prompt


FAULTS: dict[str, Fault] = {
    "rope factor 1": _config(rope_global_factor=1.0),
    "rope factor 7": _config(rope_global_factor=7.0),
    "window one too short": _config(sliding_window=15),
    "window one too long": _config(sliding_window=17),
    "causal image mask": _causal_images,
    "images see each other": _images_merged,
    "features in another order": _features_reversed,
    "norm without +1": _norm_without_one,
    "one norm without +1": _one_norm_without_one,
    "embeddings unscaled": _embeddings_unscaled,
    "features scaled": _features_scaled,
    "local base of the global layers": _config(rope_local_base=1_000_000.0),
    "global base of the local layers": _config(rope_global_base=10_000.0),
    "pattern shifted by one layer": _config(layer_kinds=("local",) * 4 + ("global", "local")),
    "queries scaled by hidden / heads": _config(query_pre_attn_scalar=16),
    "epsilon 1e-2": _config(rms_norm_eps=1e-2),
    "exact GELU": _exact_gelu,
    "rotation interleaved": _interleaved_rotation,
}
SMALLER = {"exact GELU": 3}
"""Faults whose error is small by nature: the two forms of GELU differ by 5e-4 at most."""


@pytest.fixture(scope="module")
def prompt(nano_config: ModelConfig) -> Passage:
    return passage(nano_config, 60, (7, 21))


@pytest.fixture(scope="module")
def expected(nano_twin: Twin, prompt: Passage) -> torch.Tensor:
    return twin_logits(nano_twin, prompt)


def test_without_a_fault_the_comparison_passes(nano_model: Gemma3, prompt: Passage, expected: torch.Tensor) -> None:
    assert relative_error(eager_logits(nano_model, prompt), expected) <= TOLERANCES["eager.logits"].relative


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch, nano_model: Gemma3, prompt: Passage, expected: torch.Tensor, name: str
) -> None:
    model, given = FAULTS[name](monkeypatch, nano_model, prompt)
    error = relative_error(eager_logits(model, given), expected)
    assert error > SMALLER.get(name, FAR) * TOLERANCES["eager.logits"].relative, f"{name} errs by {error:.3g} only"


def test_a_window_fault_shows_from_the_window_on(nano_model: Gemma3, nano_twin: Twin, nano_config: ModelConfig) -> None:
    """W tokens cannot tell a window one too long, W + 1 can: the lengths around W are tested for a reason."""
    model, text = _with_text(nano_model, sliding_window=17), passage(nano_config, 17)
    expected, ours = twin_logits(nano_twin, text), eager_logits(model, text)
    limit = TOLERANCES["eager.logits"].relative
    assert relative_error(ours[:16], expected[:16]) <= limit
    assert relative_error(ours[16:], expected[16:]) > FAR * limit
