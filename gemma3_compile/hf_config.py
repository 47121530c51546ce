"""Reads and writes a ``config.json`` in transformers' form.

Two spellings are in the wild. Version 4 wrote ``rope_theta``, ``rope_local_base_freq``, ``rope_scaling`` and
``sliding_window_pattern``; version 5 writes ``rope_parameters`` and ``layer_types``. Text-only files
(``model_type`` ``gemma3_text``) hold the text fields at the top; files with vision (``gemma3``) hold
``text_config`` and ``vision_config``. A missing field takes the default of transformers' ``Gemma3TextConfig``,
``Gemma3Config`` or ``SiglipVisionConfig``; a field that asks for what gemma3c does not compute is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

from gemma3_compile.config import LayerKind, ModelConfig, SpecialTokens, TextConfig, VisionConfig, layer_pattern
from gemma3_compile.presets import CUSTOM, named
from runtimes.errors import ConfigError

Dialect = Literal["v4", "v5"]

_KIND_OF: Mapping[str, LayerKind] = {"sliding_attention": "local", "full_attention": "global"}
_TYPE_OF: Mapping[LayerKind, str] = {kind: name for name, kind in _KIND_OF.items()}
_ACTIVATION = "gelu_pytorch_tanh"
_DEFAULT_PERIOD = 6


class _Fields:
    """The fields of one JSON object, read with their types checked; ``where`` leads every message."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: expected a JSON object, but got {raw!r}")
        self.raw: Mapping[str, Any] = raw
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def refuse(self, name: str, expected: str, hint: str | None = None) -> ConfigError:
        """An error that names the field, what was expected and what stands there."""
        return ConfigError(f"{self.where}: `{name}` must be {expected}, but got {self.raw.get(name)!r}", hint=hint)

    def integer(self, name: str, default: int) -> int:
        """An integer; null and missing give ``default``."""
        value = self.raw.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            raise self.refuse(name, "an integer")
        return int(value)

    def number(self, name: str, default: float) -> float:
        """A finite number; null and missing give ``default``."""
        value = self.raw.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise self.refuse(name, "a number")
        return float(value)

    def section(self, name: str) -> _Fields:
        """An object inside this one; null and missing give an empty one."""
        return _Fields(self.raw[name] if name in self else {}, f"{self.where}.{name}")

    def only(self, name: str, *allowed: object) -> None:
        """Refuses the field unless it is missing, null or one of ``allowed``."""
        value = self.raw.get(name)
        if value is not None and not any(
            value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed
        ):
            expected = " or ".join(repr(a) for a in allowed) if allowed else "absent or null"
            raise self.refuse(
                name, expected, hint="gemma3c compiles Gemma 3 as Google published it, without this variant"
            )


def from_hf_config(
    raw: Mapping[str, Any], *, generation_config: Mapping[str, Any] | None = None, where: str = "config.json"
) -> ModelConfig:
    """A model configuration from transformers' dictionary, version 4 or 5, text-only or with vision.

    Args:
        raw: the parsed ``config.json``.
        generation_config: the parsed ``generation_config.json`` where there is one. Its ``eos_token_id`` wins, as
            in transformers: that of an instruction-tuned checkpoint adds the end of a turn.
        where: what to call the file in messages.

    Returns:
        The configuration, named after the preset it matches, or ``custom``.

    Raises:
        ConfigError: another model type, a variant gemma3c does not compute, or a contradiction.
    """
    top = _Fields(raw, where)
    model_type = top.raw.get("model_type")
    if model_type == "gemma3_text":
        text, vision = top, None
    elif model_type == "gemma3":
        for name in ("text_config", "vision_config"):
            if name not in top:
                raise top.refuse(name, "a JSON object in a file whose `model_type` is 'gemma3'")
        text, vision = top.section("text_config"), top.section("vision_config")
        text.only("model_type", "gemma3_text")
    else:
        raise top.refuse("model_type", "'gemma3_text' or 'gemma3'", hint="gemma3c compiles Gemma 3 only")
    top.only("tie_word_embeddings", True)
    decoder = _read_text(text)
    tower = None if vision is None else _read_vision(vision, top.integer("mm_tokens_per_image", 256))
    tokens = _read_tokens(top, text, decoder, has_vision=tower is not None, generation_config=generation_config)
    return named(ModelConfig(name=CUSTOM, text=decoder, vision=tower, tokens=tokens))


def _read_text(fields: _Fields) -> TextConfig:
    fields.only("hidden_activation", _ACTIVATION)
    fields.only("tie_word_embeddings", True)
    for name in ("attention_bias", "use_bidirectional_attention"):
        fields.only(name, False)
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        fields.only(name)
    num_layers = fields.integer("num_hidden_layers", 26)
    local_base, global_base, global_factor = _read_rope(fields)
    return TextConfig(
        vocab_size=fields.integer("vocab_size", 262_208),
        hidden_size=fields.integer("hidden_size", 2304),
        intermediate_size=fields.integer("intermediate_size", 9216),
        num_layers=num_layers,
        num_heads=fields.integer("num_attention_heads", 8),
        num_kv_heads=fields.integer("num_key_value_heads", 4),
        head_dim=fields.integer("head_dim", 256),
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", 256),
        sliding_window=fields.integer("sliding_window", 4096),
        layer_kinds=_read_layer_kinds(fields, num_layers),
        max_context=fields.integer("max_position_embeddings", 131_072),
        rope_local_base=local_base,
        rope_global_base=global_base,
        rope_global_factor=global_factor,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
    )


def _read_layer_kinds(fields: _Fields, num_layers: int) -> tuple[LayerKind, ...]:
    """``layer_types`` where it stands (it wins, as in transformers), else the pattern's period, else five to one."""
    if "layer_types" in fields:
        types = fields.raw["layer_types"]
        if not isinstance(types, list | tuple) or any(t not in _KIND_OF for t in types):
            raise fields.refuse("layer_types", f"a list of {' and '.join(map(repr, _KIND_OF))}")
        if len(types) != num_layers:
            raise fields.refuse("layer_types", f"as long as num_hidden_layers, {num_layers}")
        return tuple(_KIND_OF[t] for t in types)
    # Files of transformers 4.53 and later carry the underscored name, always beside layer_types; others may not.
    name = "sliding_window_pattern" if "sliding_window_pattern" in fields else "_sliding_window_pattern"
    period = fields.integer(name, _DEFAULT_PERIOD)
    if period < 1:
        raise fields.refuse(name, "1 or more")
    return layer_pattern(num_layers, period)


def _read_rope(fields: _Fields) -> tuple[float, float, float]:
    """Base of local layers, base and factor of global layers; version 5's spelling wins over version 4's."""
    parameters = fields.section("rope_parameters")
    unknown = sorted(set(parameters.raw) - set(_KIND_OF))
    if unknown:
        raise fields.refuse(
            "rope_parameters",
            f"an object of {' and '.join(map(repr, _KIND_OF))}",
            hint=f"unexpected: {', '.join(unknown)}",
        )
    old = fields.section("rope_scaling")
    whole, sliding = parameters.section("full_attention"), parameters.section("sliding_attention")
    factor = _read_rope_factor(old if old.raw else whole)
    if _read_rope_factor(sliding) != 1.0:
        raise sliding.refuse("factor", "1 on local layers, whose positions Gemma 3 does not scale")
    return (
        sliding.number("rope_theta", fields.number("rope_local_base_freq", 10_000.0)),
        whole.number("rope_theta", fields.number("rope_theta", 1_000_000.0)),
        factor,
    )


def _read_rope_factor(fields: _Fields) -> float:
    """What positions are divided by: 1 for rope type ``default``, ``factor`` for ``linear``."""
    name = "rope_type" if "rope_type" in fields else "type"  # early version 4 files say `type`
    kind = fields.raw.get(name) or "default"
    if kind not in ("default", "linear"):
        raise fields.refuse(name, "'default' or 'linear'")
    if kind == "default":
        return 1.0
    if "factor" not in fields:
        raise fields.refuse("factor", "a number where the rope type is 'linear'")
    return fields.number("factor", 1.0)


def _read_vision(fields: _Fields, tokens_per_image: int) -> VisionConfig:
    fields.only("model_type", "siglip_vision_model")
    fields.only("hidden_act", _ACTIVATION)
    fields.only("num_channels", 3)
    return VisionConfig(
        image_size=fields.integer("image_size", 224),
        patch_size=fields.integer("patch_size", 16),
        hidden_size=fields.integer("hidden_size", 768),
        intermediate_size=fields.integer("intermediate_size", 3072),
        num_layers=fields.integer("num_hidden_layers", 12),
        num_heads=fields.integer("num_attention_heads", 12),
        tokens_per_image=tokens_per_image,
        layer_norm_eps=fields.number("layer_norm_eps", 1e-6),
    )


def _read_tokens(
    top: _Fields, text: _Fields, decoder: TextConfig, *, has_vision: bool, generation_config: Mapping[str, Any] | None
) -> SpecialTokens:
    """The ids at the top of the file win over those of ``text_config``, as they do when transformers generates."""
    generation = _Fields(generation_config or {}, "generation_config.json")

    def source(name: str) -> _Fields:
        return top if name in top else text

    end = _read_end(generation if "eos_token_id" in generation else source("eos_token_id"))
    bos, pad = source("bos_token_id").integer("bos_token_id", 2), source("pad_token_id").integer("pad_token_id", 0)
    if not has_vision:
        return SpecialTokens(bos=bos, pad=pad, end=end)
    image_name = "image_token_index" if "image_token_index" in top else "image_token_id"
    image = top.integer(image_name, 262_144)
    if not 0 <= image < decoder.vocab_size:
        raise top.refuse(image_name, f"an id below text_config.vocab_size, {decoder.vocab_size}")
    start_name = "boi_token_index" if "boi_token_index" in top else "boi_token_id"
    end_name = "eoi_token_index" if "eoi_token_index" in top else "eoi_token_id"
    return SpecialTokens(
        bos=bos,
        pad=pad,
        end=end,
        start_of_image=top.integer(start_name, 255_999),
        end_of_image=top.integer(end_name, 256_000),
        image=image,
    )


def _read_end(fields: _Fields) -> tuple[int, ...]:
    value = fields.raw.get("eos_token_id")
    ids = value if isinstance(value, list | tuple) else [1 if value is None else value]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise fields.refuse("eos_token_id", "an integer or a list of integers")
    return tuple(ids)


def to_hf_config(config: ModelConfig, dialect: Dialect = "v5") -> dict[str, Any]:
    """The dictionary transformers would write for ``config``; :func:`from_hf_config` reads it back.

    ``v4`` spells rope and layer pattern as version 4 did, falling back to ``layer_types`` (which late files of
    version 4 have) where the layers follow no period.
    """
    text = _write_text(config.text, dialect)
    tokens = config.tokens
    ids = {"bos_token_id": tokens.bos, "pad_token_id": tokens.pad, "eos_token_id": list(tokens.end)}
    if config.vision is None:
        return {"architectures": ["Gemma3ForCausalLM"], **text, **ids}
    vision = config.vision
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "layer_norm_eps": vision.layer_norm_eps,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": vision.tokens_per_image,
        "boi_token_index": tokens.start_of_image,
        "eoi_token_index": tokens.end_of_image,
        "image_token_index": tokens.image,
        **ids,
    }


def _write_text(text: TextConfig, dialect: Dialect) -> dict[str, Any]:
    scaled = text.rope_global_factor != 1.0
    scaling = {"rope_type": "linear", "factor": text.rope_global_factor} if scaled else {"rope_type": "default"}
    written: dict[str, Any] = {
        "model_type": "gemma3_text",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_activation": _ACTIVATION,
        "query_pre_attn_scalar": int(text.query_pre_attn_scalar)
        if float(text.query_pre_attn_scalar).is_integer()
        else text.query_pre_attn_scalar,
        "sliding_window": text.sliding_window,
        "max_position_embeddings": text.max_context,
        "rms_norm_eps": text.rms_norm_eps,
    }
    if dialect == "v5":
        written["layer_types"] = [_TYPE_OF[kind] for kind in text.layer_kinds]
        written["rope_parameters"] = {
            "full_attention": {"rope_theta": text.rope_global_base, **scaling},
            "sliding_attention": {"rope_theta": text.rope_local_base, "rope_type": "default"},
        }
        return written
    period = text.layer_kinds.index("global") + 1 if "global" in text.layer_kinds else text.num_layers + 1
    if layer_pattern(text.num_layers, period) == text.layer_kinds:
        written["sliding_window_pattern"] = period
    else:
        written["layer_types"] = [_TYPE_OF[kind] for kind in text.layer_kinds]
    written["rope_theta"] = text.rope_global_base
    written["rope_local_base_freq"] = text.rope_local_base
    written["rope_scaling"] = scaling if scaled else None
    return written
