"""Keys and values on the GPU, read and written in place: rings of local layers, all slots of global ones.

Legend: B batch, G key-value heads, D head_dim, C slots of a global cache, which the plan fixes.

Buffers are as long as the plan says, whatever context is asked for. So those that are given back serve the next batch of
the same size, with the captured step that they belong to.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtimes.errors import UsageError
from runtimes.manifest import Manifest
from runtimes.session import Caches
from runtimes.trt.engine_file import cache_input
from runtimes.trt.gpu import ALIGNMENT_BYTES, Gpu, aligned

if TYPE_CHECKING:
    from runtimes.trt.contexts import Context
    from runtimes.trt.step import Step

_ITEM_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class CachePlace:
    """One cache in the buffers: its shape for one sequence [G, slots, D], and the byte at which all sequences begin."""

    shape: tuple[int, ...]
    begin: int
    row_bytes: int


class CacheBuffers:
    """All caches of ``batch`` sequences in one piece of memory.

    ``step`` is what decodes over them; it is made at the first step.
    """

    def __init__(self, manifest: Manifest, gpu: Gpu, batch: int) -> None:
        places, size = {}, 0
        for tensor in manifest.stages["decoder"].inputs:
            if tensor.name.startswith("cache."):
                shape = tuple(int(dim) for dim in tensor.shape[1:])
                row_bytes = math.prod(shape) * _ITEM_BYTES
                places[tensor.name] = CachePlace(shape=shape, begin=size, row_bytes=row_bytes)
                if batch > 1 and row_bytes % ALIGNMENT_BYTES:
                    raise UsageError(
                        f"a sequence takes {row_bytes} bytes of {tensor.name}, and with a batch of {batch} that must be a "
                        f"multiple of {ALIGNMENT_BYTES}",
                        hint="build the bundle with a --context that is a multiple of 256",
                    )
                size += aligned(batch * row_bytes)
        self.places: Mapping[str, CachePlace] = places
        self.outputs = {t.name: source for t in manifest.stages["decoder"].outputs if (source := cache_input(t.name))}
        self.batch = batch
        self.bytes = size
        self.memory = gpu.allocate(size, f"the caches of {batch} sequence{'s' if batch > 1 else ''}")
        self.step: Step | None = None

    def bind(self, context: Context, sequence: int | None = None) -> None:
        """Tells a context of all sequences, or of one: what it reads, and that it writes there."""
        rows = self.batch if sequence is None else 1
        for name, place in self.places.items():
            context.set_input(name, self._address(place, sequence), (rows, *place.shape))
        for output, source in self.outputs.items():
            context.set_address(output, self._address(self.places[source], sequence))

    def _address(self, place: CachePlace, sequence: int | None) -> int:
        return self.memory.address + place.begin + (sequence or 0) * place.row_bytes

    def close(self) -> None:
        """Gives the memory back."""
        if self.step is not None:
            self.step.close()
            self.step = None
        self.memory.close()


class TrtCaches(Caches):
    """See :class:`runtimes.session.Caches`. The buffers go to ``give_back`` with the last reference to this."""

    def __init__(self, buffers: CacheBuffers, *, context: int, give_back: Callable[[CacheBuffers], None]) -> None:
        super().__init__(batch=buffers.batch, context=context, bytes_allocated=buffers.bytes)
        self.buffers = buffers
        weakref.finalize(self, give_back, buffers).atexit = False
