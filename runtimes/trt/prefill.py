"""Chunks of one sequence: run through the profile for chunks, or, a single token, through that for tokens.

Legend: S tokens of the chunk, M rows of image features, H hidden, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtimes.session import Chunk
from runtimes.trt.bfloat16 import bits_of
from runtimes.trt.caches import CacheBuffers
from runtimes.trt.contexts import Context, Contexts
from runtimes.trt.engine_file import DECODE, PREFILL, Plan
from runtimes.trt.gpu import Gpu, aligned

_INT64 = 8
_ROWS = ("token_ids", "feature_rows", "image_ids")
"""int64 [1, S]."""
_NUMBERS = ("start", "length", "rows")
"""int64, one each."""


class Prefill:
    """Buffers for the longest chunk, and the contexts that run over them.

    Attributes:
        chunk: the most tokens of a run.
    """

    def __init__(self, plan: Plan, contexts: Contexts, gpu: Gpu, *, hidden: int, vocab: int) -> None:
        self.chunk = plan.most("token_ids", PREFILL)[1]
        self._plan, self._contexts, self._gpu = plan, contexts, gpu
        self._hidden, self._vocab = hidden, vocab
        self._images = plan.has_input("image_ids")
        row = aligned(self.chunk * _INT64)
        self._begins = {name: index * row for index, name in enumerate(_ROWS)}
        self._begins |= {name: 3 * row + index * aligned(_INT64) for index, name in enumerate(_NUMBERS)}
        self._integer_bytes = 3 * row + 3 * aligned(_INT64)
        self._features_bytes = self.chunk * hidden * 2 if self._images else 0
        size = self._integer_bytes + self._features_bytes
        self._given = gpu.pinned(size)
        self._inputs = gpu.allocate(size, "the inputs of a chunk")
        self._result = gpu.pinned(vocab * 4)
        self._logits = gpu.allocate(vocab * 4, "the logits of a chunk")
        self._logits_1V: NDArray[np.float32] = self._result.array(0, (1, vocab), np.float32)
        # Text passes a row of features that no token reads: it must be finite.
        gpu.fill(self._inputs.address, 0, size)
        self._made: dict[int, Context] = {PREFILL: contexts.make(PREFILL, "many")}

    def run(
        self, buffers: CacheBuffers, sequence: int, start: int, chunk: Chunk, *, logits: bool
    ) -> NDArray[np.float32] | None:
        """Adds a chunk of at most ``chunk`` tokens at ``start``; gives logits [1, V] of its last token where asked to.

        Raises:
            HostError, GpuError: as the message says.
        """
        size = len(chunk)
        assert 1 <= size <= self.chunk, size
        context = self._context(DECODE if size == 1 else PREFILL)
        self._write(chunk, start)
        self._upload(chunk)
        self._bind(context, buffers, sequence, chunk)
        context.run()
        if logits:
            self._gpu.download(self._result.address, self._logits.address, self._vocab * 4)
        self._gpu.finish()
        return self._logits_1V.copy() if logits else None

    def close(self) -> None:
        """Gives contexts and memory back."""
        self._made.clear()
        self._inputs.close()
        self._logits.close()

    def _context(self, profile: int) -> Context:
        if profile not in self._made:
            self._made[profile] = self._contexts.make(profile, "few")
        return self._made[profile]

    def _write(self, chunk: Chunk, start: int) -> None:
        size = len(chunk)
        nothing = np.full(size, -1, dtype=np.int64)
        values = {
            "token_ids": chunk.token_ids,
            "feature_rows": nothing if chunk.feature_rows is None else chunk.feature_rows,
            "image_ids": nothing if chunk.image_ids is None else chunk.image_ids,
        }
        for name, row_S in values.items():
            self._given.array(self._begins[name], (size,), np.int64)[:] = row_S
        for name, number in zip(_NUMBERS, (start, size, size - 1), strict=True):
            self._given.array(self._begins[name], (1,), np.int64)[0] = number
        if chunk.features is not None:
            features = self._given.array(self._integer_bytes, chunk.features.shape, np.uint16)
            features[:] = bits_of(chunk.features)

    def _upload(self, chunk: Chunk) -> None:
        size = self._integer_bytes
        if chunk.features is not None:
            size += chunk.features.size * 2
        self._gpu.upload(self._inputs.address, self._given.address, size)

    def _bind(self, context: Context, buffers: CacheBuffers, sequence: int, chunk: Chunk) -> None:
        size = len(chunk)
        begin = self._inputs.address
        shapes = {"token_ids": (1, size), "start": (1,), "length": (1,), "rows": (1, 1)}
        if self._images:
            shapes |= {"feature_rows": (1, size), "image_ids": (1, size)}
            rows = 1 if chunk.features is None else len(chunk.features)
            context.set_input("features", begin + self._integer_bytes, (rows, self._hidden))
        for name, shape in shapes.items():
            context.set_input(name, begin + self._begins[name], shape)
        context.set_address("logits", self._logits.address)
        buffers.bind(context, sequence)
        context.check_complete()
