"""Keys and values for ONNX Runtime: one buffer for each cache input of the graph, updated in place.

Legend: B batch, G key-value heads, D head_dim; slots: the window of a local layer, the context of a
global one.

The graph reads ``cache.{i}.k`` and writes ``cache.{i}.k.out``. Both are bound to one address, so
nothing is copied; a sequence of the batch is the address of its row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import BundleError
from runtimes.ort_options import OrtProvider, onnxruntime
from runtimes.session import Caches

if TYPE_CHECKING:
    from runtimes.manifest import LayerFacts, Manifest

_ALIGNMENT_BYTES = 64
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has no such type


class CacheBuffer:
    """[B, slots of one layer] on one device, zeroed: unwritten rows must be finite.

    Args:
        shape: (B, G, slots, D).
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: str, provider: OrtProvider) -> None:
        self.shape = shape
        self.element: Any = np.float32 if dtype == "float32" else _BFLOAT16
        self.provider = provider
        itemsize = 4 if dtype == "float32" else 2
        self.row_bytes = math.prod(shape[1:]) * itemsize
        self.host: NDArray[np.float32] | None = None
        if provider == "cpu":
            self.host = aligned_zeros(shape)
            self._owner: Any = self.host
            self.address = self.host.ctypes.data
        else:
            self._owner = _device_zeros(shape, dtype)
            self.address = self._owner.data_ptr()

    @property
    def bytes_allocated(self) -> int:
        """What the buffer takes."""
        return self.shape[0] * self.row_bytes

    def bind(self, binding: Any, source: str, target: str | None, sequence: int | None) -> None:
        """Binds the input ``source`` and, unless None, the output ``target`` to all rows or to one."""
        address = self.address + (sequence or 0) * self.row_bytes
        shape = self.shape if sequence is None else (1, *self.shape[1:])
        binding.bind_input(source, self.provider, 0, self.element, shape, address)
        if target is not None:
            binding.bind_output(target, self.provider, 0, self.element, shape, address)


class OrtCaches(Caches):
    """The buffers of every layer, keys before values.

    ``decode`` is whatever the session keeps to run a step on these buffers again; it is dropped
    when a buffer moves.
    """

    def __init__(self, manifest: Manifest, *, batch: int, context: int, provider: OrtProvider) -> None:
        self._layers = manifest.model.layers
        self._dtype, self._provider = manifest.caches.dtype, provider
        self._slack = window_slack(manifest, provider)
        self.buffers = {
            name: self._new_buffer(layer, batch, context)
            for index, layer in enumerate(self._layers)
            for name in (f"cache.{index}.k", f"cache.{index}.v")
        }
        super().__init__(batch=batch, context=context, bytes_allocated=self._count_bytes())
        self.decode: Any = None

    def bind(self, binding: Any, *, sequence: int | None, in_place: bool = True) -> None:
        """Binds every cache input, and every output too if ``in_place``."""
        for name, buffer in self.buffers.items():
            buffer.bind(binding, name, f"{name}.out" if in_place else None, sequence)

    def bind_aside(self, binding: Any) -> dict[str, CacheBuffer]:
        """Binds every cache output to a new buffer for one sequence, for a graph that is not in place."""
        aside = {}
        for name, buffer in self.buffers.items():
            fresh = CacheBuffer((1, *buffer.shape[1:]), self._dtype, self._provider)
            binding.bind_output(f"{name}.out", fresh.provider, 0, fresh.element, fresh.shape, fresh.address)
            aside[name] = fresh
        return aside

    def take(self, aside: dict[str, CacheBuffer], sequence: int) -> None:
        """Makes what :meth:`bind_aside` received the cache of ``sequence``."""
        if self.batch == 1:
            self.buffers, self.decode = aside, None
            return
        for name, buffer in self.buffers.items():
            fresh = aside[name].host
            assert buffer.host is not None and fresh is not None, "the session refuses this on a device"
            buffer.host[sequence] = fresh[0]

    def grow(self, context: int) -> None:
        """Room for ``context`` tokens in global layers, what is there kept. On the CPU only."""
        for name, layer in self._named_layers():
            old = self.buffers[name]
            if layer.window is None:
                new = self._new_buffer(layer, self.batch, context)
                assert old.host is not None and new.host is not None, "the session refuses this on a device"
                new.host[:, :, : self.context] = old.host
                self.buffers[name] = new
        self.context = context
        self.bytes_allocated = self._count_bytes()
        self.decode = None

    def _named_layers(self) -> Iterator[tuple[str, LayerFacts]]:
        for index, layer in enumerate(self._layers):
            yield f"cache.{index}.k", layer
            yield f"cache.{index}.v", layer

    def _new_buffer(self, layer: LayerFacts, batch: int, context: int) -> CacheBuffer:
        slots = context if layer.window is None else layer.window + self._slack
        return CacheBuffer((batch, layer.kv_heads, slots, layer.head_dim), self._dtype, self._provider)

    def _count_bytes(self) -> int:
        return sum(buffer.bytes_allocated for buffer in self.buffers.values())


def window_slack(manifest: Manifest, provider: OrtProvider) -> int:
    """Slots of a local layer beyond its window.

    A compact cache that is full moves all its rows for each token; with a few slots to spare it moves them
    once for as many tokens. CUDA's operator takes exactly the window.
    """
    slack = manifest.settings.get("window_slack", 0)
    if not isinstance(slack, int) or slack < 0:
        raise BundleError(f"settings.window_slack: expected a whole number of at least 0, but got {slack!r}")
    return slack if provider == "cpu" else 0


def aligned_zeros(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """float32 zeros at an address that vector loads like; the system gives pages as they are written."""
    size = math.prod(shape) * 4
    raw = np.zeros(size + _ALIGNMENT_BYTES, dtype=np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[offset : offset + size].view(np.float32).reshape(shape)


def _device_zeros(shape: tuple[int, ...], dtype: str) -> Any:
    """A zeroed OrtValue on the GPU."""
    ort = onnxruntime()
    if dtype == "float32":
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), "cuda", 0)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), _BFLOAT16, "cuda", 0)
    value.update_inplace(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), _BFLOAT16))
    return value
