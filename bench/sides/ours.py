"""gemma3c: a bundle in ``runtimes``' session, prompts in chunks as its engine takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.sides.base import Side, Tokens
from runtimes import chunking
from runtimes.bundle import Bundle
from runtimes.session import Caches, Chunk, open_session


class Ours(Side):
    def load(self, path: Path) -> None:
        bundle = Bundle.open(path)
        self._chunk = int(bundle.manifest.settings.get("prefill_chunk", chunking.DEFAULT_CHUNK))
        self._session = open_session(bundle, provider="cpu", threads=self.threads)
        self._caches: Caches | None = None
        self._next = np.zeros(1, dtype=np.int64)

    def prompt(self, tokens: Tokens) -> None:
        self._caches = self._session.open_caches(1, self.context)
        logits = None
        for start in range(0, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            last = start + len(part) == len(tokens)
            logits = self._session.extend(self._caches, 0, Chunk(token_ids=part), rows="last" if last else None)
        assert logits is not None
        self._next[0] = logits[-1].argmax()

    def advance(self) -> None:
        assert self._caches is not None
        self._next[0] = self._session.step(self._caches, self._next)[0].argmax()
