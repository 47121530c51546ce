"""A bundle for ONNX Runtime, loaded: chunks, steps and pictures on the CPU or on CUDA.

Legend: B batch, S tokens in a chunk, R rows of logits, V vocabulary, H hidden, M image feature rows,
N pictures, T tokens a picture.

The caches stay where they are and the graph writes into them (``ort_caches``). A step runs on a binding
made once: token ids, positions and logits have fixed addresses, so a step costs no binding at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import HostError, UsageError
from runtimes.huge_pages import on_huge_pages
from runtimes.ort_caches import OrtCaches, aligned_zeros
from runtimes.ort_options import OrtProvider, choose_provider, onnxruntime, open_graph, session_options, translated
from runtimes.session import Caches, Chunk, Provider, Rows, Session, require_context

if TYPE_CHECKING:
    from runtimes.bundle import Bundle

_OUT_OF_MEMORY_HINT = "if memory ran out: a shorter context, a smaller batch, or a bundle with smaller weights"


class OrtSession(Session):
    """See :class:`runtimes.session.Session`. The graphs for pictures are loaded with the first picture.

    Args:
        bundle: for the target ``ort``.
        provider: ``auto``, ``cpu`` or ``cuda``.
        threads: of the CPU; None takes the physical cores that this process may use.

    Raises:
        HostError, BundleError: as :func:`runtimes.session.open_session`.
    """

    provider: OrtProvider

    def __init__(self, bundle: Bundle, *, provider: Provider = "auto", threads: int | None = None) -> None:
        self.manifest = bundle.manifest
        self._bundle = bundle
        self._threads = threads
        self.provider = choose_provider(provider, bundle.manifest)
        self._graphs: dict[str, Any] = {}
        self._run_options = onnxruntime().RunOptions()
        self._graph("decoder")

    def open_caches(self, batch: int, context: int) -> OrtCaches:
        require_context(context, self.manifest.model.max_context)
        if batch < 1:
            raise UsageError(f"`batch >= 1` must hold, but got {batch}")
        return OrtCaches(self.manifest, batch=batch, context=context, provider=self.provider)

    def grow_caches(self, caches: Caches, context: int) -> bool:
        assert isinstance(caches, OrtCaches)
        require_context(context, self.manifest.model.max_context)
        if self.provider != "cpu":
            return False
        if context > caches.context:
            caches.grow(context)
        return True

    def extend(self, caches: Caches, sequence: int, chunk: Chunk, rows: Rows = "last") -> NDArray[np.float32] | None:
        assert isinstance(caches, OrtCaches)
        caches.require_room(sequence, len(chunk))
        size = len(chunk)
        wanted = np.arange(size) if rows == "all" else np.array([size - 1])
        logits_1RV = np.empty((1, len(wanted), self.manifest.model.vocab_size), dtype=np.float32)
        stage = "decoder_image" if chunk.has_image else "decoder"
        binding = self._graph(stage).io_binding()
        self._bind_input(binding, "token_ids", chunk.token_ids[None].astype(np.int64))
        self._bind_input(binding, "start", caches.lengths[sequence : sequence + 1].copy())
        self._bind_input(binding, "length", np.array([size], dtype=np.int64))
        self._bind_input(binding, "rows", wanted[None].astype(np.int64))
        _bind_output(binding, "logits", logits_1RV)
        if chunk.has_image:
            self._run_with_image(binding, caches, sequence, chunk)
        else:
            caches.bind(binding, sequence=sequence)
            self._run(stage, binding)
        caches.lengths[sequence] += size
        return None if rows is None else logits_1RV[0]

    def step(
        self, caches: Caches, token_ids: NDArray[np.int64], active: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        assert isinstance(caches, OrtCaches)
        if active is None or active.all():
            active = None
            fullest = int(caches.lengths.argmax())
        else:
            fullest = int(np.where(active, caches.lengths, -1).argmax())
        if caches.lengths[fullest] >= caches.context:
            caches.require_room(fullest, 1)
        if caches.decode is None:
            caches.decode = _DecodeBinding(self, caches)
        decode: _DecodeBinding = caches.decode
        if active is None:
            decode.token_ids_B1[:, 0] = token_ids
            decode.start_B[:] = caches.lengths
            decode.length_B[:] = 1
        else:
            decode.token_ids_B1[:, 0] = np.where(active, token_ids, self.manifest.model.tokens.pad)
            # A graph may write the row of an idle sequence before it drops it, so that row must exist.
            np.minimum(caches.lengths, caches.context - 1, out=decode.start_B)
            decode.length_B[:] = active
        decode.run(self)
        caches.lengths += decode.length_B
        return decode.logits_BV

    def encode_images(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        if "vision" not in self.manifest.stages:
            raise UsageError(
                f"a picture was given, but this bundle of {self.manifest.model.name!r} is text-only",
                hint="leave the picture out, or build a size from 4b up",
            )
        graph = self._graph("vision")
        features = []
        for pixels_1CHW in np.split(pixels.astype(np.float32, copy=False), len(pixels)):
            # One at a time: attention over 4096 patches takes about a gigabyte for each picture.
            with translated(HostError, "the vision stage failed", _OUT_OF_MEMORY_HINT):
                features.append(graph.run(["features"], {"pixels": pixels_1CHW})[0])
        rows_NTH = np.concatenate(features)
        return rows_NTH.reshape(-1, rows_NTH.shape[-1])

    def close(self) -> None:
        self._graphs.clear()

    def _graph(self, stage: str) -> Any:
        if stage not in self._graphs:
            settings = self.manifest.settings
            path = self._bundle.path(self.manifest.stages[stage].graph)
            with on_huge_pages():
                self._graphs[stage] = open_graph(path, session_options(settings, self._threads), self.provider)
        return self._graphs[stage]

    def _run_with_image(self, binding: Any, caches: OrtCaches, sequence: int, chunk: Chunk) -> None:
        assert chunk.features is not None and chunk.feature_rows is not None and chunk.image_ids is not None
        self._bind_input(binding, "features", np.ascontiguousarray(chunk.features, dtype=np.float32))
        self._bind_input(binding, "feature_rows", chunk.feature_rows[None].astype(np.int64))
        self._bind_input(binding, "image_ids", chunk.image_ids[None].astype(np.int64))
        if self.manifest.settings.get("image_in_place", False):
            caches.bind(binding, sequence=sequence)
            self._run("decoder_image", binding)
            return
        if self.provider == "cuda" and caches.batch > 1:
            raise HostError(
                f"pictures in a batch of {caches.batch} sequences cannot be run on CUDA with this bundle",
                hint="send prompts with pictures one at a time",
            )
        caches.bind(binding, sequence=sequence, in_place=False)
        aside = caches.bind_aside(binding)
        self._run("decoder_image", binding)
        caches.take(aside, sequence)

    def _bind_input(self, binding: Any, name: str, array: NDArray[Any]) -> None:
        """Binds a host array: shared on the CPU, copied to the device now on CUDA."""
        if self.provider == "cpu":
            binding.bind_ortvalue_input(name, onnxruntime().OrtValue.ortvalue_from_numpy(array))
        else:
            binding.bind_cpu_input(name, array)

    def _run(self, stage: str, binding: Any) -> None:
        with translated(HostError, f"the stage {stage!r} failed in ONNX Runtime", _OUT_OF_MEMORY_HINT):
            self._graph(stage).run_with_iobinding(binding, self._run_options)


class _DecodeBinding:
    """One step over one set of buffers, bound once."""

    def __init__(self, session: OrtSession, caches: OrtCaches) -> None:
        batch = caches.batch
        self.token_ids_B1 = np.zeros((batch, 1), dtype=np.int64)
        self.start_B = np.zeros(batch, dtype=np.int64)
        self.length_B = np.zeros(batch, dtype=np.int64)
        self._rows_B1 = np.zeros((batch, 1), dtype=np.int64)
        logits_B1V = aligned_zeros((batch, 1, session.manifest.model.vocab_size))
        self.logits_BV = logits_B1V[:, 0]
        self._binding = session._graph("decoder").io_binding()
        self._bind_inputs(session)
        _bind_output(self._binding, "logits", logits_B1V)
        caches.bind(self._binding, sequence=None)

    def run(self, session: OrtSession) -> None:
        """Runs the step with what stands in the arrays now."""
        if session.provider == "cuda":
            self._bind_inputs(session)  # the device holds copies
        session._run("decoder", self._binding)

    def _bind_inputs(self, session: OrtSession) -> None:
        session._bind_input(self._binding, "token_ids", self.token_ids_B1)
        session._bind_input(self._binding, "start", self.start_B)
        session._bind_input(self._binding, "length", self.length_B)
        session._bind_input(self._binding, "rows", self._rows_B1)


def _bind_output(binding: Any, name: str, array: NDArray[np.float32]) -> None:
    binding.bind_ortvalue_output(name, onnxruntime().OrtValue.ortvalue_from_numpy(array))
