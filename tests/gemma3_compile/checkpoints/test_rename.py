"""The rename table: every spelling of a tensor leads to one name, and nothing else does."""

from __future__ import annotations

import pytest

from gemma3_compile.checkpoints.check import expected_shapes
from gemma3_compile.checkpoints.rename import GGUF, SAFETENSORS, rename
from gemma3_compile.presets import preset
from runtimes.errors import CheckpointError
from tests.gemma3_compile.checkpoints.gguf_files import ggml_name

_SPELLINGS = {
    "decoder.embed_tokens.weight": "{}embed_tokens.weight",
    "decoder.layers.41.self_attn.q_norm.weight": "{}layers.41.self_attn.q_norm.weight",
    "decoder.layers.0.post_feedforward_layernorm.weight": "{}layers.0.post_feedforward_layernorm.weight",
    "decoder.layers.0.mlp.down_proj.weight": "{}layers.0.mlp.down_proj.weight",
    "decoder.norm.weight": "{}norm.weight",
    "vision.patch_embedding.bias": "{}embeddings.patch_embedding.bias",
    "vision.position_embedding.weight": "{}embeddings.position_embedding.weight",
    "vision.layers.26.self_attn.out_proj.bias": "{}encoder.layers.26.self_attn.out_proj.bias",
    "vision.layers.0.layer_norm2.weight": "{}encoder.layers.0.layer_norm2.weight",
    "vision.layers.0.mlp.fc1.weight": "{}encoder.layers.0.mlp.fc1.weight",
    "vision.post_layernorm.weight": "{}post_layernorm.weight",
    "vision.soft_emb_norm.weight": "{}mm_soft_emb_norm.weight",
    "vision.input_projection.weight": "{}mm_input_projection_weight",
}
_PREFIXES = {
    "decoder": ["model.", "language_model.model.", "model.language_model."],
    "vision": [f"{root}vision_tower.{inner}" for root in ("", "model.") for inner in ("", "vision_model.")],
    "projector": ["multi_modal_projector.", "model.multi_modal_projector."],
}


def _group(canonical: str) -> str:
    if canonical.split(".")[1] in ("soft_emb_norm", "input_projection"):
        return "projector"
    return canonical.partition(".")[0]


@pytest.mark.parametrize("canonical", _SPELLINGS)
def test_every_spelling_leads_to_the_canonical_name(canonical: str) -> None:
    for prefix in _PREFIXES[_group(canonical)]:
        stored = _SPELLINGS[canonical].format(prefix)
        assert rename([stored], SAFETENSORS, "x").stored == {canonical: stored}


@pytest.mark.parametrize(
    ("stored", "head"),
    [
        ("lm_head.weight", True),
        ("language_model.lm_head.weight", True),
        ("vision_tower.vision_model.head.attention.in_proj_weight", False),
        ("vision_tower.head.probe", False),
        ("vision_tower.vision_model.embeddings.position_ids", False),
        ("model.rotary_emb.inv_freq", False),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", False),
    ],
)
def test_what_the_model_does_not_use_is_ignored(stored: str, head: bool) -> None:
    renamed = rename([stored], SAFETENSORS, "x")
    assert not renamed.stored
    assert renamed.tied_heads == ((stored,) if head else ())


@pytest.mark.parametrize(
    "stored",
    [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.qweight",
        "base_model.model.model.norm.weight",
        "model.layers.x.mlp.up_proj.weight",
        "vision_tower.encoder.layers.0.mlp.fc1.weight_scale",
    ],
)
def test_other_names_stay_as_they_are_to_be_reported(stored: str) -> None:
    assert rename([stored], SAFETENSORS, "x").stored == {stored: stored}


def test_ggufs_names_cover_the_whole_decoder_and_mark_its_norms() -> None:
    names = list(expected_shapes(preset("270m")))
    renamed = rename([ggml_name(name) for name in names], GGUF, "x")
    assert renamed.stored == {name: ggml_name(name) for name in names}
    assert renamed.plus_one == {name for name in names if "norm" in name}


def test_two_spellings_of_one_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"`language_model.model.norm.weight` and `model.norm.weight` both mean"):
        rename(["model.norm.weight", "language_model.model.norm.weight"], SAFETENSORS, "x")
