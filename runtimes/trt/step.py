"""One token of every sequence: a run whose addresses never change, captured as a CUDA graph after its first time.

Legend: B batch, V vocabulary.

What changes from step to step (token ids, starts, lengths) stands in one pinned block, which the graph copies to the GPU
at its beginning; at its end it copies the logits back. A step is then one launch and one wait.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import Gemma3CompileError
from runtimes.gpu.device import DeviceMemory
from runtimes.manifest import Manifest
from runtimes.trt.caches import CacheBuffers
from runtimes.trt.contexts import Context
from runtimes.trt.gpu import Gpu, aligned

_INT64 = 8


class Step:
    """Decoding over one set of buffers.

    Args:
        context: of the profile for single tokens; nobody else changes it.
        images: whether the decoder takes pictures, which a step then passes none of.

    Attributes:
        token_ids_B, start_B, length_B: int64, to be filled before :meth:`run`.
        logits_BV: float32, what the last run gave.
        captured: whether runs are launches of a graph.
    """

    def __init__(self, context: Context, buffers: CacheBuffers, gpu: Gpu, manifest: Manifest, *, images: bool) -> None:
        batch, model = buffers.batch, manifest.model
        self._context, self._gpu = context, gpu
        self._graph: Any = None
        self._may_capture = True
        self._row_bytes = aligned(batch * _INT64)
        self._given = gpu.pinned(3 * self._row_bytes)
        self.token_ids_B, self.start_B, self.length_B = (
            self._given.array(row * self._row_bytes, (batch,), np.int64) for row in range(3)
        )
        self._logits_bytes = batch * model.vocab_size * 4
        self._result = gpu.pinned(self._logits_bytes)
        self.logits_BV: NDArray[np.float32] = self._result.array(0, (batch, model.vocab_size), np.float32)
        self._inputs = gpu.allocate(3 * self._row_bytes, "the inputs of a step")
        self._logits = gpu.allocate(self._logits_bytes, "the logits of a step")
        self._constants: list[DeviceMemory] = []
        self._bind(buffers, model.hidden_size, images=images)

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def run(self) -> None:
        """Runs with what stands in the arrays now, and waits for the logits.

        Raises:
            HostError, GpuError: as the message says.
        """
        if self._graph is not None:
            self._graph.launch(self._gpu.stream)
            self._gpu.finish()
            return
        self._enqueue()
        self._gpu.finish()
        # TensorRT does part of its work at the first run over new shapes, which no graph may hold. So not before now.
        self._capture()

    def close(self) -> None:
        """Gives back what the GPU holds for it."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        for memory in (self._inputs, self._logits, *self._constants):
            memory.close()

    def _enqueue(self) -> None:
        self._gpu.upload(self._inputs.address, self._given.address, 3 * self._row_bytes)
        self._context.run()
        self._gpu.download(self._result.address, self._logits.address, self._logits_bytes)

    def _capture(self) -> None:
        if not self._may_capture:
            return
        self._may_capture = False
        if not self._context.can_be_captured:
            return
        try:
            self._graph = self._gpu.capture(self._enqueue)
        except Gemma3CompileError:
            self._graph = None  # steps go on as calls, which is slower and as right

    def _bind(self, buffers: CacheBuffers, hidden: int, *, images: bool) -> None:
        batch, context = buffers.batch, self._context
        begin, row = self._inputs.address, self._row_bytes
        context.set_input("token_ids", begin, (batch, 1))
        context.set_input("start", begin + row, (batch,))
        context.set_input("length", begin + 2 * row, (batch,))
        context.set_input("rows", self._constant(row, 0), (batch, 1))
        context.set_address("logits", self._logits.address)
        if images:
            context.set_input("features", self._constant(hidden * 2, 0), (1, hidden))
            for name in ("feature_rows", "image_ids"):
                context.set_input(name, self._constant(row, 0xFF), (batch, 1))  # -1: no picture
        buffers.bind(context)
        context.check_complete()

    def _constant(self, size: int, byte: int) -> int:
        memory = self._gpu.allocate(size, "the inputs of a step")
        self._gpu.fill(memory.address, byte, memory.bytes)
        self._constants.append(memory)
        return memory.address
