"""onnxruntime-genai: its own generation loop, greedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.sides.base import Side, Tokens


class Genai(Side):
    def load(self, path: Path) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(path))
        # As shipped it runs one thread.
        threads = {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._genai, self._model = genai, genai.Model(config)
        self._generator: Any = None

    def prompt(self, tokens: Tokens) -> None:
        self._generator = None  # before the next one, so that there is never room for two caches
        parameters = self._genai.GeneratorParams(self._model)
        # min_length keeps it going past an end token.
        parameters.set_search_options(do_sample=False, max_length=self.context, min_length=self.context)
        self._generator = self._genai.Generator(self._model, parameters)
        self._generator.append_tokens(tokens.astype(np.int32))
        self._generator.generate_next_token()  # chooses from the prompt's logits; each later call runs the model first

    def advance(self) -> None:
        self._generator.generate_next_token()
