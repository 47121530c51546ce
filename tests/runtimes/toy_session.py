"""A session without a model: its logits are a function of every token and picture fed so far.

One token out of place, twice, or missing gives other logits, so that a mistake in feeding shows in what
is written. It also holds the engine to the session's contract: pictures whole, windows not rewound.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from runtimes.manifest import Manifest
from runtimes.session import Caches, Chunk, Rows, Session, require_context

History = list[tuple[int, float]]
"""Token ids, and for a picture's token the feature that stood at it (0 for text)."""


def toy_logits(history: History, vocab_size: int = 512) -> np.ndarray:
    """[V], below 500 (text) larger than the rest, and never an end token's the largest."""
    seed = zlib.crc32(np.array(history, dtype=np.float64).tobytes())
    logits = np.random.default_rng(seed).standard_normal(vocab_size).astype(np.float32) * 4
    logits[500:] -= 50
    logits[[0, 1, 2, 3, 105, 106, 255, 256]] -= 50
    return logits


class ToyCaches(Caches):
    """What was fed, for each sequence."""

    def __init__(self, batch: int, context: int) -> None:
        super().__init__(batch=batch, context=context, bytes_allocated=batch * context * 16)
        self.histories: list[History] = [[] for _ in range(batch)]
        self.longest = [0] * batch


class ToySession(Session):
    """Records every chunk and step; ``script`` replaces the tokens that logits point to."""

    provider = "cpu"

    def __init__(self, manifest: Manifest, *, window: int = 16, can_grow: bool = True) -> None:
        self.manifest = manifest
        self.window = window
        self.can_grow = can_grow
        self.script: list[int] = []
        self.chunks: list[tuple[int, Chunk, Rows]] = []
        self.steps: list[list[int]] = []
        self.opened: list[ToyCaches] = []
        self.encoded = 0
        self.spoil: Callable[[np.ndarray], None] | None = None
        self.closed = False

    def open_caches(self, batch: int, context: int) -> Caches:
        require_context(context, self.manifest.model.max_context)
        self.opened.append(ToyCaches(batch, context))
        return self.opened[-1]

    def grow_caches(self, caches: Caches, context: int) -> bool:
        require_context(context, self.manifest.model.max_context)
        if self.can_grow:
            caches.context = context
        return self.can_grow

    def extend(self, caches: Caches, sequence: int, chunk: Chunk, rows: Rows = "last") -> np.ndarray | None:
        caches.require_room(sequence, len(chunk))
        self.chunks.append((sequence, chunk, rows))
        fed = chunk.token_ids.tolist()
        shown = [0.0] * len(fed)
        if chunk.has_image:
            assert chunk.features is not None and chunk.feature_rows is not None and chunk.image_ids is not None
            shown = [float(chunk.features[row, 0]) if row >= 0 else 0.0 for row in chunk.feature_rows]
            for image in set(chunk.image_ids[chunk.image_ids >= 0].tolist()):
                assert (chunk.image_ids == image).sum() == 4, "a picture was cut"
        all_logits = [self._add(caches, sequence, token, feature) for token, feature in zip(fed, shown, strict=True)]
        if rows is None:
            return None
        logits = np.stack(all_logits if rows == "all" else all_logits[-1:])
        return self._scripted(logits)

    def step(self, caches: Caches, token_ids: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
        logits = np.full((caches.batch, self.manifest.model.vocab_size), np.nan, dtype=np.float32)
        self.steps.append(token_ids.tolist())
        for sequence in range(caches.batch):
            if active is None or active[sequence]:
                caches.require_room(sequence, 1)
                logits[sequence] = self._add(caches, sequence, int(token_ids[sequence]), 0.0)
        return self._scripted(logits)

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        self.encoded += len(pixels)
        means = pixels.mean(axis=(1, 2, 3))
        tokens = np.arange(4) / 10
        return (means[:, None] + tokens).reshape(-1, 1).repeat(8, axis=1).astype(np.float32)

    def close(self) -> None:
        self.closed = True

    def _add(self, caches: Caches, sequence: int, token: int, feature: float) -> np.ndarray:
        assert isinstance(caches, ToyCaches)
        length = int(caches.lengths[sequence])
        longest = caches.longest[sequence]
        assert length in (0, longest) or longest <= self.window, "a window that had forgotten was rewound"
        caches.histories[sequence] = [*caches.histories[sequence][:length], (token, feature)]
        caches.lengths[sequence] = caches.longest[sequence] = length + 1
        return toy_logits(caches.histories[sequence], self.manifest.model.vocab_size)

    def _scripted(self, logits: np.ndarray) -> np.ndarray:
        if self.script:
            logits[-1, self.script.pop(0)] = 100.0
        if self.spoil is not None:
            self.spoil(logits)
        return logits
