"""llama.cpp through llama-cpp-python: ``Llama.eval``, and the largest logit taken with numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.sides.base import Side, Tokens


class Llama(Side):
    def load(self, path: Path) -> None:
        import llama_cpp

        # swa_full=False: local layers keep their window only, as ours do.
        self._model = llama_cpp.Llama(
            str(path),
            n_ctx=self.context,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            swa_full=False,
            verbose=False,
        )
        self._vocab = self._model.n_vocab()
        self._next = 0

    def prompt(self, tokens: Tokens) -> None:
        self._model.reset()
        self._eval(tokens.tolist())

    def advance(self) -> None:
        self._eval([self._next])

    def _eval(self, tokens: list[int]) -> None:
        self._model.eval(tokens)
        logits = np.ctypeslib.as_array(self._model._ctx.get_logits(), shape=(self._vocab,))
        self._next = int(logits.argmax())
