"""Our eager model and transformers' model with the same weights: seeded here, compared in the tests.

Legend: S tokens of a passage, V vocabulary, M rows of image features, H hidden, N images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma3_compile.checkpoints.rename import SAFETENSORS, rename
from gemma3_compile.config import ModelConfig
from gemma3_compile.hf_config import to_hf_config
from gemma3_compile.model import Gemma3

Twin = nn.Module
"""transformers' ``Gemma3ForConditionalGeneration`` or ``Gemma3ForCausalLM``."""


def seeded_model(config: ModelConfig, seed: int = 0) -> Gemma3:
    """Random weights that keep activations near 1 and attention sharp, so that a wrong mask or angle shows."""
    model = Gemma3(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.copy_(0.6 + 0.3 * noise)
        elif name.endswith(("layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight")):
            weight.copy_(1.0 + 0.2 * noise)
        elif weight.dim() == 1:
            weight.copy_(0.2 * noise)
        else:
            fan_in = weight.shape[0] if name.endswith("input_projection.weight") else weight[0].numel()
            weight.copy_(noise * fan_in**-0.5)
    return model


def twin_of(model: Gemma3) -> Twin:
    """transformers' model with ``model``'s weights (memory is shared where dtypes agree)."""
    import transformers

    raw = to_hf_config(model.config)
    if model.config.vision is None:
        config = transformers.Gemma3TextConfig(**raw)
        twin: Twin = transformers.Gemma3ForCausalLM(config)
    else:
        config = transformers.Gemma3Config(**raw)
        twin = transformers.Gemma3ForConditionalGeneration(config)
    renamed = rename(twin.state_dict(), SAFETENSORS, "the twin")
    ours = model.state_dict()
    assert renamed.stored.keys() == ours.keys(), sorted(renamed.stored.keys() ^ ours.keys())
    state = {stored: ours[name] for name, stored in renamed.stored.items()}
    twin.load_state_dict(state | dict.fromkeys(renamed.tied_heads, ours["decoder.embed_tokens.weight"]))
    return twin.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Passage:
    """A prompt with images in it.

    ``token_ids``, ``image_ids`` and ``feature_rows`` are int64 [S], -1 for text in the last two;
    ``pixels`` is fp32 [N, 3, size, size], None for text alone.
    """

    token_ids: Tensor
    image_ids: Tensor
    feature_rows: Tensor
    pixels: Tensor | None

    def __len__(self) -> int:
        return self.token_ids.shape[0]


def passage(config: ModelConfig, length: int, images_at: Sequence[int] = (), seed: int = 1) -> Passage:
    """``length`` random text tokens; an image's tokens begin at each of ``images_at``."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = min(500, config.text.vocab_size) - 4
    token_ids = 4 + torch.randint(ordinary, (length,), generator=generator)
    image_ids, rows = torch.full((length,), -1), torch.full((length,), -1)
    if not images_at:
        return Passage(token_ids=token_ids, image_ids=image_ids, feature_rows=rows, pixels=None)
    assert config.vision is not None and config.tokens.image is not None
    count = config.vision.tokens_per_image
    for image, start in enumerate(images_at):
        token_ids[start : start + count] = config.tokens.image
        image_ids[start : start + count] = image
        rows[start : start + count] = image * count + torch.arange(count)
    size = config.vision.image_size
    pixels = torch.randn((len(images_at), 3, size, size), generator=generator)
    return Passage(token_ids=token_ids, image_ids=image_ids, feature_rows=rows, pixels=pixels)


def twin_logits(twin: Twin, prompt: Passage) -> Tensor:
    """Logits [S, V] of transformers, uncached."""
    if prompt.pixels is None:
        return twin(input_ids=prompt.token_ids[None], use_cache=False).logits[0]
    return twin(
        input_ids=prompt.token_ids[None],
        pixel_values=prompt.pixels,
        token_type_ids=(prompt.image_ids >= 0).long()[None],
        use_cache=False,
    ).logits[0]


def features_of(model: Gemma3, prompt: Passage) -> Tensor | None:
    """Rows of image features [M, H], None for a passage without images."""
    if prompt.pixels is None or model.vision is None:
        return None
    return model.vision(prompt.pixels).flatten(0, 1)


def eager_logits(model: Gemma3, prompt: Passage, chunks: Iterable[int] = ()) -> Tensor:
    """Logits [S, V] of ours, in chunks of the sizes given; what is left over (all, by default) is the last chunk."""
    length = len(prompt)
    features = features_of(model, prompt)
    caches = model.decoder.empty_caches(1, length)
    logits, start = [], 0
    sizes = [*chunks]
    for size in [*sizes, length - sum(sizes)]:
        if size == 0:
            continue
        part = slice(start, start + size)
        out, caches = model.decoder(
            prompt.token_ids[None, part],
            torch.tensor([start]),
            torch.tensor([size]),
            torch.arange(size)[None],
            caches,
            features,
            None if features is None else prompt.feature_rows[None, part],
            None if features is None else prompt.image_ids[None, part],
        )
        logits.append(out[0])
        start += size
    return torch.cat(logits)
