"""The eager text decoder against transformers with the same weights, fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gemma3_compile.config import ModelConfig, layer_pattern
from gemma3_compile.model import Gemma3
from tests.tolerances import check
from tests.twins import Twin, eager_logits, passage, seeded_model, twin_logits, twin_of

WINDOW = 16  # of nano
LENGTHS = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1, 5 * WINDOW + 3)


@pytest.mark.parametrize("length", LENGTHS)
def test_uncached_equals_transformers(nano_model: Gemma3, nano_twin: Twin, length: int) -> None:
    prompt = passage(nano_model.config, length)
    check("eager.logits", eager_logits(nano_model, prompt), twin_logits(nano_twin, prompt))


@pytest.mark.parametrize("length", LENGTHS)
def test_token_by_token_equals_transformers(nano_model: Gemma3, nano_twin: Twin, length: int) -> None:
    prompt = passage(nano_model.config, length)
    check("eager.logits", eager_logits(nano_model, prompt, [1] * length), twin_logits(nano_twin, prompt))


@pytest.mark.parametrize(
    "chunks",
    [(3,) * 20, (5, 1, 7, 11), (15, 16, 17), (16, 16, 16), (31, 33), (1, 50), (50, 1, 1), (17, 2)],
    ids=lambda sizes: "-".join(map(str, sizes[:4])),
)
def test_odd_chunks_equal_transformers(nano_model: Gemma3, nano_twin: Twin, chunks: tuple[int, ...]) -> None:
    prompt = passage(nano_model.config, 5 * WINDOW + 3)
    ours = eager_logits(nano_model, prompt, chunks)
    check("eager.logits", ours, twin_logits(nano_twin, prompt))
    check("eager.chunking", ours, eager_logits(nano_model, prompt))


def test_rows_are_chosen_by_index(nano_model: Gemma3) -> None:
    prompt = passage(nano_model.config, 20)
    caches = nano_model.decoder.empty_caches(1, 20)
    arguments = (prompt.token_ids[None], torch.tensor([0]), torch.tensor([20]))
    rows = torch.tensor([[19, 3, 3]])
    logits, _ = nano_model.decoder(*arguments, rows, caches)
    check("eager.chunking", logits[0], eager_logits(nano_model, prompt)[rows[0]])
    assert logits.dtype == torch.float32


def test_caches_are_as_small_as_promised(nano_model: Gemma3) -> None:
    """A local layer keeps W slots whatever the context, a global one the context."""
    shapes = [tuple(k.shape) for k, _ in nano_model.decoder.empty_caches(3, 200)]
    assert shapes == [(3, 2, WINDOW, 32)] * 5 + [(3, 2, 200, 32)]


def test_the_callers_caches_are_left_alone(nano_model: Gemma3) -> None:
    prompt = passage(nano_model.config, 9)
    caches = nano_model.decoder.empty_caches(1, 16)
    nano_model.decoder(prompt.token_ids[None], torch.tensor([0]), torch.tensor([9]), torch.tensor([[8]]), caches)
    assert all(not k.any() and not v.any() for k, v in caches)


def test_past_3000_positions_with_divided_rope(nano_config: ModelConfig, nano_model: Gemma3) -> None:
    config = replace(nano_config, name="custom", text=replace(nano_config.text, max_context=4096), vision=None)
    assert config.text.rope_global_factor == 8.0
    model = seeded_model(config)
    prompt = passage(config, 3100)
    ours = eager_logits(model, prompt, (1000, 777, 1001))
    theirs = twin_logits(twin_of(model), prompt)
    check("eager.logits", ours, theirs)
    check("eager.logits", ours[3000:], theirs[3000:], "the positions past 3,000 alone")


def _variant(nano: ModelConfig, **text: object) -> ModelConfig:
    return replace(nano, name="custom", text=replace(nano.text, **text), vision=None)


VARIANTS: dict[str, dict[str, object]] = {
    # 27b: head_dim 128, and queries scaled by hidden / heads = 168, not by head_dim.
    "27b": {"hidden_size": 336, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "query_pre_attn_scalar": 168},
    "270m": {"num_kv_heads": 1, "rope_global_factor": 1.0, "sliding_window": 8},
    "no grouping": {"num_kv_heads": 4},
    "layers end in local ones": {"num_layers": 8, "layer_kinds": layer_pattern(8)},
    "all global": {"layer_kinds": ("global",) * 6},
    "all local": {"layer_kinds": ("local",) * 6},
    "other bases": {"rope_local_base": 500.0, "rope_global_base": 20_000.0, "rope_global_factor": 3.0},
    "large epsilon": {"rms_norm_eps": 1e-2},
    "window of one": {"sliding_window": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_transformers(nano_config: ModelConfig, name: str) -> None:
    model = seeded_model(_variant(nano_config, **VARIANTS[name]))
    prompt = passage(model.config, 41)
    theirs = twin_logits(twin_of(model), prompt)
    check("eager.logits", eager_logits(model, prompt), theirs, f"{name}, uncached")
    check("eager.logits", eager_logits(model, prompt, (7, 1, 1, 13)), theirs, f"{name}, in chunks")
