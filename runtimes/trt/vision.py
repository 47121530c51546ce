"""Pictures through the plan of the vision tower.

Legend: N pictures, Y and X pixels, T tokens a picture, H hidden.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from runtimes.trt.bfloat16 import bits_of, floats_of
from runtimes.trt.contexts import Contexts
from runtimes.trt.engine_file import Plan
from runtimes.trt.gpu import Gpu


class Vision:
    """Buffers for as many pictures as the plan takes at once, and a context over them."""

    def __init__(self, plan: Plan, contexts: Contexts, gpu: Gpu) -> None:
        self._gpu = gpu
        self._picture = plan.most("pixels", 0)[1:]
        self._most = plan.most("pixels", 0)[0]
        (output,) = plan.facts.outputs
        self._features = tuple(int(dim) for dim in output.shape[1:])
        sizes = [2 * self._most * math.prod(shape) for shape in (self._picture, self._features)]
        self._given, self._result = (gpu.pinned(size) for size in sizes)
        self._pixels_memory, self._features_memory = (gpu.allocate(size, "pictures") for size in sizes)
        self._context = contexts.make(0, "few")
        self._context.set_address("features", self._features_memory.address)

    def run(self, pixels_N3YX: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features [N, T, H].

        Raises:
            HostError, GpuError: as the message says.
        """
        parts = [self._some(pixels_N3YX[at : at + self._most]) for at in range(0, len(pixels_N3YX), self._most)]
        return np.concatenate(parts) if parts else np.zeros((0, *self._features), dtype=np.float32)

    def close(self) -> None:
        """Gives the memory back."""
        self._pixels_memory.close()
        self._features_memory.close()

    def _some(self, pixels_N3YX: NDArray[np.float32]) -> NDArray[np.float32]:
        shape = (len(pixels_N3YX), *self._picture)
        given = self._given.array(0, shape, np.uint16)
        given[:] = bits_of(pixels_N3YX)
        self._gpu.upload(self._pixels_memory.address, self._given.address, given.nbytes)
        self._context.set_input("pixels", self._pixels_memory.address, shape)
        self._context.check_complete()
        self._context.run()
        result = self._result.array(0, (shape[0], *self._features), np.uint16)
        self._gpu.download(self._result.address, self._features_memory.address, result.nbytes)
        self._gpu.finish()
        return floats_of(result)
