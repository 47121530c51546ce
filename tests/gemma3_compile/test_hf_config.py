"""Configurations in transformers' form: both spellings, published files, defaults, refusals."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest

from gemma3_compile.config import ModelConfig
from gemma3_compile.hf_config import Dialect, from_hf_config, to_hf_config
from gemma3_compile.presets import PRESETS, preset
from runtimes.errors import ConfigError

# The fields that matter of google's own files, as published: the larger ones leave the defaults out.
_SIGLIP = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
_TOP = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255_999,
    "eoi_token_index": 256_000,
    "eos_token_id": [1, 106],
    "image_token_index": 262_144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "vision_config": _SIGLIP,
}
_SCALED = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
_SMALL = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32_768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10_000,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": 512,
    "vocab_size": 262_144,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "270m": _SMALL
    | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "eos_token_id": 1}
    | {"_sliding_window_pattern": 6, "use_bidirectional_attention": False}
    | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3},
    "1b": _SMALL
    | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "eos_token_id": [1, 106]}
    | {"sliding_window_pattern": 6, "cache_implementation": "hybrid"},
    "4b": _TOP | {"text_config": _SCALED | {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34}},
    "12b": _TOP
    | {
        "text_config": _SCALED
        | {"hidden_size": 3840, "intermediate_size": 15_360, "num_hidden_layers": 48}
        | {"num_attention_heads": 16, "num_key_value_heads": 8}
    },
    "27b": _TOP
    | {
        "text_config": _SCALED
        | {"hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 62, "head_dim": 128}
        | {"num_attention_heads": 32, "num_key_value_heads": 16, "query_pre_attn_scalar": 168}
    },
}
DIALECTS: tuple[Dialect, ...] = ("v4", "v5")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_the_presets(name: str) -> None:
    config = from_hf_config(PUBLISHED[name])
    assert config.name == name
    assert (config.text, config.vision) == (preset(name).text, preset(name).vision)
    assert config.tokens.end == ((1,) if name == "270m" else (1, 106))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str, dialect: Dialect) -> None:
    assert from_hf_config(to_hf_config(preset(name), dialect)) == preset(name)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "change",
    [
        {"layer_kinds": ("global", "local", "local", "global", "local", "global")},
        {"layer_kinds": ("local",) * 6},
        {"layer_kinds": ("global",) * 6},
        {"layer_kinds": ("local", "global") * 3},
        {"rope_local_base": 123.0, "rope_global_base": 456.0, "rope_global_factor": 2.5},
        {"rope_global_factor": 1.0, "query_pre_attn_scalar": 12.5, "rms_norm_eps": 1e-5},
    ],
    ids=lambda change: "-".join(change),
)
def test_round_trip_of_custom_models(nano_config: ModelConfig, change: dict[str, Any], dialect: Dialect) -> None:
    config = replace(nano_config, name="custom", text=replace(nano_config.text, **change))
    assert from_hf_config(to_hf_config(config, dialect)) == config


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_and_writes_what_we_do(name: str, dialect: Dialect) -> None:
    """Through transformers' own class: what it understands, and what it writes again, is the same model."""
    import transformers

    kind = transformers.Gemma3TextConfig if preset(name).vision is None else transformers.Gemma3Config
    theirs = kind(**copy.deepcopy(to_hf_config(preset(name), dialect)))
    assert from_hf_config(theirs.to_dict()) == preset(name)
    assert from_hf_config(theirs.to_diff_dict()) == preset(name)


def test_defaults_are_transformers() -> None:
    import transformers

    ours, theirs = from_hf_config({"model_type": "gemma3_text"}), transformers.Gemma3TextConfig()
    assert ours == from_hf_config(theirs.to_dict())
    assert (ours.name, ours.tokens.end, ours.text.sliding_window) == ("custom", (1,), 4096)
    vision = {"image_size": 256}  # SigLIP's own default of 224 does not divide into 256 tokens
    top = from_hf_config({"model_type": "gemma3", "text_config": {"vocab_size": 262_208}, "vision_config": vision})
    full = transformers.Gemma3Config(vision_config={"model_type": "siglip_vision_model", **vision})
    assert top == from_hf_config(full.to_dict())


@pytest.mark.parametrize(
    ("raw", "kinds"),
    [
        ({}, "LLLLLGLL"),
        ({"sliding_window_pattern": 4}, "LLLGLLLG"),
        ({"_sliding_window_pattern": 3}, "LLGLLGLL"),
        ({"sliding_window_pattern": 4, "layer_types": ["full_attention"] * 8}, "GGGGGGGG"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 4}, "LGLGLGLG"),
    ],
    ids=["neither", "pattern", "underscored", "types win", "types"],
)
def test_layer_kinds(raw: dict[str, Any], kinds: str) -> None:
    config = from_hf_config({"model_type": "gemma3_text", "num_hidden_layers": 8, **raw})
    assert "".join(kind[0].upper() for kind in config.text.layer_kinds) == kinds


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, (1e4, 1e6, 1.0)),
        ({"rope_theta": 5, "rope_local_base_freq": 7}, (7, 5, 1)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, (1e4, 1e6, 4)),
        ({"rope_scaling": {"rope_type": "default"}}, (1e4, 1e6, 1)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 3, "rope_type": "linear", "factor": 2}}}, (1e4, 3, 2)),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 3, "rope_type": "default"}}}, (3, 1e6, 1)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 3}}, "rope_theta": 9}, (1e4, 3, 1)),
        ({"rope_parameters": None, "rope_theta": 9}, (1e4, 9, 1)),
    ],
    ids=str,
)
def test_rope(raw: dict[str, Any], expected: tuple[float, float, float]) -> None:
    """As transformers resolves each spelling, which is asked too."""
    import transformers

    text = from_hf_config({"model_type": "gemma3_text", **raw}).text
    assert (text.rope_local_base, text.rope_global_base, text.rope_global_factor) == expected
    if raw.get("rope_scaling", {}).get("rope_type") != "default":
        theirs = transformers.Gemma3TextConfig(**copy.deepcopy(raw)).rope_parameters
        whole = theirs["full_attention"]
        assert (theirs["sliding_attention"]["rope_theta"], whole["rope_theta"], whole.get("factor", 1.0)) == expected


def test_end_tokens() -> None:
    text = {"model_type": "gemma3_text"}
    assert from_hf_config({**text, "eos_token_id": 7}).tokens.end == (7,)
    assert from_hf_config({**text, "eos_token_id": [1, 106]}).tokens.end == (1, 106)
    assert from_hf_config({**text, "eos_token_id": 1}, generation_config={"eos_token_id": [1, 106]}).tokens.end == (
        1,
        106,
    )
    inner = copy.deepcopy(PUBLISHED["4b"])
    inner["text_config"]["eos_token_id"] = 1
    assert from_hf_config(inner).tokens.end == (1, 106), "the top of the file wins"
    del inner["eos_token_id"]
    assert from_hf_config(inner).tokens.end == (1,)


# change to the published 4b file (text_config, vision_config or the top), and what the message must say
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("", {"model_type": "gemma2"}, "`model_type` must be 'gemma3_text' or 'gemma3', but got 'gemma2'"),
    ("", {"model_type": None}, "`model_type` must be 'gemma3_text' or 'gemma3', but got None"),
    ("", {"text_config": None}, "`text_config` must be a JSON object"),
    ("", {"vision_config": None}, "`vision_config` must be a JSON object"),
    ("", {"text_config": 3}, "text_config: expected a JSON object, but got 3"),
    ("", {"tie_word_embeddings": False}, "`tie_word_embeddings` must be True, but got False"),
    ("", {"mm_tokens_per_image": 255}, "`tokens_per_image` must be a square"),
    ("", {"image_token_index": 262_208}, "`image_token_index` must be an id below text_config.vocab_size, 262208"),
    ("", {"eos_token_id": "<eos>"}, "`eos_token_id` must be an integer or a list of integers, but got '<eos>'"),
    ("", {"eos_token_id": []}, "`eos_token_id` must be an integer or a list of integers, but got []"),
    ("text_config", {"model_type": "llama"}, "text_config: `model_type` must be 'gemma3_text', but got 'llama'"),
    ("text_config", {"attention_bias": True}, "text_config: `attention_bias` must be False, but got True"),
    ("text_config", {"use_bidirectional_attention": True}, "`use_bidirectional_attention` must be False"),
    (
        "text_config",
        {"final_logit_softcapping": 30.0},
        "`final_logit_softcapping` must be absent or null, but got 30.0",
    ),
    ("text_config", {"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping` must be absent or null, but got 50.0"),
    ("text_config", {"hidden_activation": "gelu"}, "`hidden_activation` must be 'gelu_pytorch_tanh', but got 'gelu'"),
    (
        "text_config",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "text_config.rope_scaling: `rope_type` must be 'default' or 'linear', but got 'yarn'",
    ),
    ("text_config", {"rope_scaling": {"type": "dynamic"}}, "`type` must be 'default' or 'linear', but got 'dynamic'"),
    ("text_config", {"rope_scaling": {"rope_type": "linear"}}, "`factor` must be a number"),
    (
        "text_config",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}},
        "text_config.rope_parameters.sliding_attention: `factor` must be 1 on local layers",
    ),
    ("text_config", {"rope_parameters": {"rope_theta": 1e4}}, "`rope_parameters` must be an object of"),
    ("text_config", {"layer_types": ["full_attention"]}, "`layer_types` must be as long as num_hidden_layers, 34"),
    ("text_config", {"layer_types": ["chunked_attention"] * 34}, "`layer_types` must be a list of"),
    ("text_config", {"sliding_window_pattern": 0}, "`sliding_window_pattern` must be 1 or more, but got 0"),
    ("text_config", {"hidden_size": "2560"}, "text_config: `hidden_size` must be an integer, but got '2560'"),
    ("text_config", {"hidden_size": True}, "`hidden_size` must be an integer, but got True"),
    ("text_config", {"hidden_size": 2560.5}, "`hidden_size` must be an integer, but got 2560.5"),
    ("text_config", {"hidden_size": float("nan")}, "`hidden_size` must be an integer, but got nan"),
    ("text_config", {"hidden_size": float("inf")}, "`hidden_size` must be an integer, but got inf"),
    ("text_config", {"rope_theta": 10**400}, "`rope_theta` must be a number"),
    ("text_config", {"rms_norm_eps": float("inf")}, "`rms_norm_eps` must be a number, but got inf"),
    ("text_config", {"rms_norm_eps": "small"}, "`rms_norm_eps` must be a number, but got 'small'"),
    ("text_config", {"num_attention_heads": 0}, "`num_heads > 0` must hold, but got 0"),
    ("text_config", {"sliding_window": -1}, "`sliding_window > 0` must hold, but got -1"),
    ("vision_config", {"model_type": "clip_vision_model"}, "`model_type` must be 'siglip_vision_model'"),
    ("vision_config", {"hidden_act": "quick_gelu"}, "vision_config: `hidden_act` must be 'gelu_pytorch_tanh'"),
    ("vision_config", {"num_channels": 1}, "vision_config: `num_channels` must be 3, but got 1"),
    ("vision_config", {"patch_size": 15}, "`image_size % patch_size == 0` must hold"),
]


@pytest.mark.parametrize(("section", "change", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused(section: str, change: dict[str, Any], message: str) -> None:
    raw = copy.deepcopy(PUBLISHED["4b"])
    (raw[section] if section else raw).update(change)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        from_hf_config(raw)
    if section and "must hold" not in message:
        assert caught.value.message.startswith("config.json.")


def test_a_file_that_is_no_object() -> None:
    with pytest.raises(ConfigError, match="expected a JSON object, but got"):
        from_hf_config([1, 2])  # type: ignore[arg-type]


def test_the_file_is_named_as_the_caller_says() -> None:
    with pytest.raises(ConfigError, match=r"^models/x/config\.json: `model_type`"):
        from_hf_config({}, where="models/x/config.json")
