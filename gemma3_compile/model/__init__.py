"""The eager model: one definition, the oracle of everything that is compiled from it."""

from __future__ import annotations

from torch import nn

from gemma3_compile.config import ModelConfig
from gemma3_compile.model.decoder import Decoder
from gemma3_compile.model.vision import VisionTower


class Gemma3(nn.Module):
    """The whole model; its parameter names are gemma3c's canonical tensor names.

    ``decoder`` is the text decoder; ``vision`` the tower with its projection, None for text-only models.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.text)
        self.vision: VisionTower | None = None
        if config.vision is not None:
            # The norm after pooling takes the tower's epsilon, not the decoder's: so does transformers.
            self.vision = VisionTower(config.vision, config.text.hidden_size, config.vision.layer_norm_eps)
