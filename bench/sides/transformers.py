"""transformers, eager, fp32, with its own cache."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.sides.base import Side, Tokens


class Transformers(Side):
    def load(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def prompt(self, tokens: Tokens) -> None:
        self._cache = None
        self._run(torch.from_numpy(tokens)[None])

    def advance(self) -> None:
        self._run(self._next)

    @torch.inference_mode()
    def _run(self, token_ids: torch.Tensor) -> None:
        out = self._model(token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        self._next = out.logits[:, -1].argmax(-1, keepdim=True)
