"""The presets: their figures, their names, and the published number of parameters."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gemma3_compile.model import Gemma3
from gemma3_compile.presets import HUB_IDS, PRESETS, match, named, preset
from runtimes.errors import UsageError

# Text decoder without its embedding, embedding (millions): Gemma 3 report (arXiv 2503.19786), table 1, which rounds;
# 270m: its model card. The tower has 417 million, the projector comes on top of it.
PUBLISHED: dict[str, tuple[int, int]] = {
    "270m": (100, 168),
    "1b": (698, 302),
    "4b": (3209, 675),
    "12b": (10_759, 1012),
    "27b": (25_600, 1416),
}


def test_names_smallest_first() -> None:
    assert list(PRESETS) == ["nano", "270m", "1b", "4b", "12b", "27b"]
    assert all(config.name == name for name, config in PRESETS.items())


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="nano, 270m, 1b, 4b, 12b, 27b, but got '7b'"):
        preset("7b")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published(name: str) -> None:
    with torch.device("meta"):
        model = Gemma3(preset(name))
    embedding = model.decoder.embed_tokens.weight.numel()
    rest = sum(p.numel() for p in model.decoder.parameters()) - embedding
    published_rest, published_embedding = PUBLISHED[name]
    assert rest / 1e6 == pytest.approx(published_rest, rel=0.01)
    assert embedding / 1e6 == pytest.approx(published_embedding, rel=0.01)
    if model.vision is not None:
        tower = sum(p.numel() for n, p in model.vision.named_parameters() if "input_projection" not in n)
        assert tower / 1e6 == pytest.approx(417, rel=0.01)


def test_270m_has_exactly_the_parameters_of_the_real_file() -> None:
    with torch.device("meta"):
        parameters = list(Gemma3(preset("270m")).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (236, 268_098_176)


def test_match_compares_architecture_only(nano_config: object) -> None:
    for name, config in PRESETS.items():
        tuned = dataclasses.replace(config, name="custom", tokens=dataclasses.replace(config.tokens, end=(1,)))
        assert match(tuned) == name
        assert named(tuned).name == name
        other = dataclasses.replace(config, text=dataclasses.replace(config.text, rope_global_base=1.5e6))
        assert match(other) is None
        assert named(other).name == "custom"


def test_text_of_a_vision_preset_alone_is_no_preset() -> None:
    assert match(dataclasses.replace(preset("4b"), vision=None)) is None


def test_every_published_size_has_a_hub_id() -> None:
    assert set(HUB_IDS) == set(PRESETS) - {"nano"}
    assert all(identifier == f"google/gemma-3-{name}-it" for name, identifier in HUB_IDS.items())


def test_nano_has_every_feature() -> None:
    """What the other packages' tests count on."""
    nano = preset("nano")
    assert set(nano.text.layer_kinds) == {"local", "global"}
    assert nano.vision is not None
    assert 1 < nano.text.num_kv_heads < nano.text.num_heads
    assert nano.text.rope_global_factor == 8.0
    assert nano.text.max_context >= 4 * nano.text.sliding_window
    assert nano.tokens.image == nano.text.vocab_size - 1


def test_nobody_can_change_a_preset() -> None:
    with pytest.raises(TypeError):
        PRESETS["nano"] = preset("1b")  # type: ignore[index]
