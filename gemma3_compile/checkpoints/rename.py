"""Names in files to gemma3c's canonical names (the parameter names of the eager model): one table a format.

safetensors files of transformers spell a text tensor ``language_model.model.…`` (files with vision, versions 4
and 5), ``model.…`` (text-only files) or ``model.language_model.…`` (memory of version 5), and a vision tensor
``vision_tower.vision_model.…`` (version 4) or ``vision_tower.…`` (version 5). GGUF has ggml's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from runtimes.errors import CheckpointError


@dataclass(frozen=True)
class Rename:
    """A stored name that matches ``pattern`` as a whole becomes ``canonical`` (a template for ``Match.expand``).

    ``plus_one``: the file holds 1 + w where the model holds w.
    """

    pattern: str
    canonical: str
    plus_one: bool = False


@dataclass(frozen=True)
class Ignore:
    """A stored name that the model has no use for, and why."""

    pattern: str
    reason: str


Rule = Rename | Ignore

_TEXT = r"(?:language_model\.model|model\.language_model|model)"
_VISION = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
_PROJECTOR = r"(?:model\.)?multi_modal_projector\."

TIED_HEAD = "tied head"
"""Reason of the one ignored tensor that is compared with another: the head is the embedding."""

SAFETENSORS: tuple[Rule, ...] = (
    Rename(rf"{_TEXT}\.(embed_tokens|norm)\.weight", r"decoder.\1.weight"),
    Rename(rf"{_TEXT}\.(layers\.\d+\.(?:self_attn|mlp)\.\w+\.weight)", r"decoder.\1"),
    Rename(rf"{_TEXT}\.(layers\.\d+\.\w+_layernorm\.weight)", r"decoder.\1"),
    Rename(rf"{_VISION}embeddings\.(patch_embedding|position_embedding)\.(weight|bias)", r"vision.\1.\2"),
    Rename(rf"{_VISION}encoder\.(layers\.\d+\.(?:\w+\.)+(?:weight|bias))", r"vision.\1"),
    Rename(rf"{_VISION}post_layernorm\.(weight|bias)", r"vision.post_layernorm.\1"),
    Rename(rf"{_PROJECTOR}mm_input_projection_weight", "vision.input_projection.weight"),
    Rename(rf"{_PROJECTOR}mm_soft_emb_norm\.weight", "vision.soft_emb_norm.weight"),
    Ignore(r"(?:language_model\.)?lm_head\.weight", TIED_HEAD),
    Ignore(rf"{_VISION}head\..+", "SigLIP's own pooling head, which Gemma 3 does not use"),
    Ignore(rf"(?:{_TEXT}|{_VISION}).*\.?(?:inv_freq|position_ids)", "a constant that is computed"),
)

_LAYER = r"decoder.layers.\1"

GGUF: tuple[Rule, ...] = (
    Rename(r"token_embd\.weight", "decoder.embed_tokens.weight"),
    Rename(r"output_norm\.weight", "decoder.norm.weight", plus_one=True),
    Rename(r"blk\.(\d+)\.attn_norm\.weight", f"{_LAYER}.input_layernorm.weight", plus_one=True),
    Rename(r"blk\.(\d+)\.post_attention_norm\.weight", f"{_LAYER}.post_attention_layernorm.weight", plus_one=True),
    Rename(r"blk\.(\d+)\.ffn_norm\.weight", f"{_LAYER}.pre_feedforward_layernorm.weight", plus_one=True),
    Rename(r"blk\.(\d+)\.post_ffw_norm\.weight", f"{_LAYER}.post_feedforward_layernorm.weight", plus_one=True),
    Rename(r"blk\.(\d+)\.attn_([qk])_norm\.weight", rf"{_LAYER}.self_attn.\2_norm.weight", plus_one=True),
    Rename(r"blk\.(\d+)\.attn_([qkv])\.weight", rf"{_LAYER}.self_attn.\2_proj.weight"),
    Rename(r"blk\.(\d+)\.attn_output\.weight", f"{_LAYER}.self_attn.o_proj.weight"),
    Rename(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", rf"{_LAYER}.mlp.\2_proj.weight"),
    Ignore(r"output\.weight", TIED_HEAD),
    Ignore(r"rope_freqs\.weight", "a constant that is computed"),
)


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """What a table made of a file's names.

    ``stored`` leads from a canonical name to the name in the file; ``plus_one`` are the canonical names whose
    tensors hold 1 + w; ``tied_heads`` are stored names of copies of the embedding. A name that no rule matches
    keeps its own name in ``stored``, so that it is reported as extra.
    """

    stored: Mapping[str, str]
    plus_one: frozenset[str]
    tied_heads: tuple[str, ...]


def _find(name: str, table: tuple[Rule, ...]) -> tuple[Rule, re.Match[str]] | None:
    for rule in table:
        if match := re.fullmatch(rule.pattern, name):
            return rule, match
    return None


def rename(names: Iterable[str], table: tuple[Rule, ...], source: str) -> Renamed:
    """Applies ``table`` to the names of a file.

    Raises CheckpointError where two stored names mean the same tensor.
    """
    stored: dict[str, str] = {}
    plus_one: set[str] = set()
    heads: list[str] = []
    for name in sorted(names):
        found = _find(name, table)
        if found is not None and isinstance(found[0], Ignore):
            heads += [name] if found[0].reason == TIED_HEAD else []
            continue
        canonical = name
        if found is not None and isinstance(found[0], Rename):
            canonical = found[1].expand(found[0].canonical)
            if found[0].plus_one:
                plus_one.add(canonical)
        if canonical in stored:
            raise CheckpointError(
                f"{source}: `{stored[canonical]}` and `{name}` both mean the tensor `{canonical}`",
                hint="the file mixes two key layouts: save the model again with one version of transformers",
            )
        stored[canonical] = name
    return Renamed(stored=stored, plus_one=frozenset(plus_one), tied_heads=tuple(heads))
