"""Builds the 270M for onnxruntime-genai with its own builder: ``python -m bench.sides.genai_builder SOURCE OUT``.

The builder of 0.18 does not get through a Gemma 3 config as transformers 5 gives it; ``_patch`` says where.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

OPTIONS = ("shared_embeddings=true", "prune_lm_head=true")
"""What makes the peer as good as it gets: one int4 table for lookup and head, and logits of the last token only."""


def _patch(builder: Any) -> None:
    """Spells the rope settings as transformers 4 did.

    transformers 5 has one dictionary for each kind of layer (``rope_parameters["full_attention"]["rope_theta"]``).
    The builder asks for ``rope_parameters["rope_type"]`` (KeyError), ``config.rope_theta`` (else it takes 10,000
    for the global layers without a word) and ``config.rope_local_base_freq`` (AttributeError).
    """
    model = builder.Gemma3Model
    plain = model.make_config_init

    def make_config_init(self: Any, config: Any) -> None:
        config.rope_theta = config.rope_parameters["full_attention"]["rope_theta"]
        config.rope_local_base_freq = config.rope_parameters["sliding_attention"]["rope_theta"]
        plain(self, config)

    model.make_config_init = make_config_init
    model.make_rope_init = lambda self, config: None  # the 270M scales no positions: there is nothing to read


def build(source: str, out: str) -> None:
    """int4 for the CPU, all else as the builder has it."""
    from onnxruntime_genai.models import builder

    _patch(builder)
    cache = str(Path(out).with_name("genai-cache"))
    options = builder.parse_extra_options("", source, out, "int4", "cpu", cache, list(OPTIONS))
    builder.create_model("", source, out, "int4", "cpu", cache, **options)


if __name__ == "__main__":
    build(sys.argv[1], sys.argv[2])
