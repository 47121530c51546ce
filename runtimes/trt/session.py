"""A bundle for TensorRT, loaded: chunks, steps and pictures on an NVIDIA GPU, through plans of either flavour.

Legend: B batch, S tokens in a chunk, R rows of logits, V vocabulary, H hidden, M image feature rows, N pictures,
T tokens a picture.

All runs are on one stream, one after the other; threads wait for each other. docs/trt-runtime.md tells what happens when.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from runtimes import chunking
from runtimes.errors import BundleError, ContextError, HostError, UsageError
from runtimes.gpu.device import GpuDevice
from runtimes.gpu.kernel_store import KernelStore
from runtimes.progress import SILENT, Progress
from runtimes.session import Caches, Chunk, Provider, Rows, Session, require_context
from runtimes.trt.binding import ARCHITECTURES, MODULES, Flavour, load
from runtimes.trt.caches import CacheBuffers, TrtCaches
from runtimes.trt.contexts import Contexts
from runtimes.trt.engine_file import DECODE, Plan, open_plan
from runtimes.trt.gpu import Gpu
from runtimes.trt.log import logger_of
from runtimes.trt.prefill import Prefill
from runtimes.trt.registry import register_plugins
from runtimes.trt.step import Step
from runtimes.trt.vision import Vision
from runtimes.trt.weights import UploadedWeights, WeightsFile, check_weights, upload_weights

if TYPE_CHECKING:
    from runtimes.bundle import Bundle
    from runtimes.manifest import Manifest

_BUILD = "gemma3c build --target trt"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stage:
    """A plan with its weights on the GPU; ``contexts`` are made of it."""

    plan: Plan
    weights: UploadedWeights | None
    contexts: Contexts

    def close(self) -> None:
        self.contexts.close()
        if self.weights is not None:
            self.weights.memory.close()


class TrtSession(Session):
    """See :class:`runtimes.session.Session`. The tower for pictures is loaded with the first picture.

    Args:
        bundle: for the target ``trt``.
        provider: ``auto`` or ``cuda``.
        progress: is told of the upload, and of what takes its time at a first start.

    Raises:
        UsageError: the provider ``cpu``.
        HostError: TensorRT, a driver or a GPU is missing, or is not what the bundle was built for.
        BundleError: plan, kernels and weights do not belong together, or are damaged.
        GpuError: the GPU has too little memory.
    """

    provider = "cuda"

    def __init__(self, bundle: Bundle, *, provider: Provider = "auto", progress: Progress = SILENT) -> None:
        if provider == "cpu":
            raise UsageError(
                f"{bundle.root} holds plans of TensorRT, which run on an NVIDIA GPU only, so it has no provider 'cpu'",
                hint="leave --provider out; or build for CPUs with `--target ort`",
            )
        self.manifest = bundle.manifest
        self._bundle, self._progress = bundle, progress
        self._trt = load(_flavour(bundle.manifest))
        self._kernels = _kernels(bundle)
        register_plugins(self._trt, self._kernels)
        self._gpu = Gpu()
        self._lock = threading.RLock()
        self._logger: Any = logger_of(self._trt)
        self._runtime: Any = self._trt.Runtime(self._logger)
        self._weights_file: WeightsFile | None = None
        self._stages: dict[str, _Stage] = {}
        self._vision: Vision | None = None
        self._buffers: WeakSet[CacheBuffers] = WeakSet()
        self._idle: deque[CacheBuffers] = deque()  # `append` is all that a finaliser may do: it comes at any moment
        decoder = self._load("decoder")
        model = self.manifest.model
        self._prefill = Prefill(
            decoder.plan, decoder.contexts, self._gpu, hidden=model.hidden_size, vocab=model.vocab_size
        )
        self._takes_images = decoder.plan.has_input("image_ids")
        self._most_sequences = decoder.plan.most("token_ids", DECODE)[0]

    def open_caches(self, batch: int, context: int) -> TrtCaches:
        self._require_context(context)
        if batch < 1:
            raise UsageError(f"`batch >= 1` must hold, but got {batch}")
        if batch > self._most_sequences:
            raise UsageError(
                f"a batch of {batch} sequences was asked for, but {self._bundle.root} was built for at most "
                f"{self._most_sequences}",
                hint=f"build it again with --batch {batch}",
            )
        with self._lock:
            self._gpu.make_current()
            buffers = self._buffers_of(batch)
            # What was there before is masked, but a NaN would come through any mask.
            self._gpu.fill(buffers.memory.address, 0, buffers.bytes)
        return TrtCaches(buffers, context=context, give_back=self._idle.append)

    def grow_caches(self, caches: Caches, context: int) -> bool:
        self._require_context(context)
        caches.context = max(caches.context, context)  # the buffers have all slots from the start
        return True

    def extend(self, caches: Caches, sequence: int, chunk: Chunk, rows: Rows = "last") -> NDArray[np.float32] | None:
        assert isinstance(caches, TrtCaches)
        caches.require_room(sequence, len(chunk))
        pieces = self._pieces(chunk, one_by_one=rows == "all")
        logits: list[NDArray[np.float32]] = []
        with self._lock:
            self._gpu.make_current()
            for number, piece in enumerate(pieces):
                wanted = rows == "all" or (rows == "last" and number == len(pieces) - 1)
                start = int(caches.lengths[sequence])
                logits_1V = self._prefill.run(caches.buffers, sequence, start, piece, logits=wanted)
                caches.lengths[sequence] += len(piece)
                if logits_1V is not None:
                    logits.append(logits_1V)
        return None if rows is None else np.concatenate(logits)

    def step(
        self, caches: Caches, token_ids: NDArray[np.int64], active: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        assert isinstance(caches, TrtCaches)
        running = np.ones(caches.batch, dtype=np.bool_) if active is None else active
        for sequence in np.flatnonzero(running & (caches.lengths >= caches.context)):
            caches.require_room(int(sequence), 1)
        with self._lock:
            self._gpu.make_current()
            is_first = caches.buffers.step is None
            step = self._step(caches.buffers)
            step.token_ids_B[:] = np.where(running, token_ids, self.manifest.model.tokens.pad)
            # A global cache takes the row of an idle sequence too: past its end, or, where it is full, over its last
            # one. A full sequence takes no token any more, so nobody reads that row.
            np.minimum(caches.lengths, self.max_context - 1, out=step.start_B)
            step.length_B[:] = running
            step.run()
            if is_first:  # not only at the end, which a server that is killed does not reach
                self._stages["decoder"].contexts.save()
        caches.lengths += running
        return step.logits_BV

    def encode_images(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        if "vision" not in self.manifest.stages:
            raise UsageError(
                f"a picture was given, but this bundle of {self.manifest.model.name!r} is text-only",
                hint="leave the picture out, or build a size from 4b up",
            )
        with self._lock:
            self._gpu.make_current()
            if self._vision is None:
                stage = self._load("vision")
                self._vision = Vision(stage.plan, stage.contexts, self._gpu)
            rows_NTH = self._vision.run(pixels)
        return rows_NTH.reshape(-1, rows_NTH.shape[-1])

    def close(self) -> None:
        with self._lock:
            if not self._stages:
                return
            self._gpu.make_current()
            self._idle.clear()
            for stage in self._stages.values():
                stage.contexts.save()
            # Contexts before what they were made of.
            for buffers in list(self._buffers):
                buffers.close()
            self._prefill.close()
            if self._vision is not None:
                self._vision.close()
                self._vision = None
            for stage in self._stages.values():
                stage.close()
            self._stages.clear()
            del self._runtime

    def _load(self, name: str) -> _Stage:
        """A stage's plan, its weights on the GPU, and memory to compute with."""
        plan = open_plan(self._bundle, name, self._trt, self._runtime, self._logger)
        weights = None
        if plan.weights:
            if self._weights_file is None:
                self._weights_file = WeightsFile(self._bundle.path(self.manifest.weights.file))
            check_weights(plan.weights, self._weights_file, plan=plan.file)
            weights = upload_weights(plan.weights, self._weights_file, self._gpu, self._progress)
        contexts = Contexts(plan, {} if weights is None else weights.addresses, self._gpu, self._bundle, self._trt)
        if not contexts.warm:
            self._progress.note(
                f"TensorRT for RTX compiles {plan.file} for {self._gpu.name} now; the next start takes it from a cache"
            )
        self._stages[name] = _Stage(plan=plan, weights=weights, contexts=contexts)
        return self._stages[name]

    def _pieces(self, chunk: Chunk, *, one_by_one: bool) -> list[Chunk]:
        """A chunk in parts that the plan takes. A plan gives logits of one row: for all of them, tokens go one by one."""
        if chunk.has_image and not self._takes_images:
            raise UsageError(
                f"a chunk has a picture, but this bundle of {self.manifest.model.name!r} is text-only",
                hint="leave the picture out",
            )
        if one_by_one and len(chunk) > 1 and chunk.has_image:
            raise UsageError(
                "a plan of TensorRT gives logits of a chunk's last token only, and a chunk with a picture must not be cut",
                hint="ask for the last row, or compare with a bundle for the target ort",
            )
        size = 1 if one_by_one else self._prefill.chunk
        image_ids, features = np.full(len(chunk), -1), None
        if chunk.features is not None and chunk.feature_rows is not None and chunk.image_ids is not None:
            image_ids = chunk.image_ids
            features = chunk.features[chunk.feature_rows[image_ids >= 0]]
        pieces = list(chunking.chunks(chunk.token_ids, image_ids, features, size))
        longest = max(len(piece) for piece in pieces)
        if longest > size:
            raise UsageError(
                f"a picture of {longest} tokens does not go into a chunk of {size}, the most that {self._bundle.root} "
                "was built for",
                hint=f"build it again with --chunk {longest}",
            )
        return pieces

    def _step(self, buffers: CacheBuffers) -> Step:
        if buffers.step is None:
            stage = self._stages["decoder"]
            context = stage.contexts.make(DECODE, "few")
            buffers.step = Step(context, buffers, self._gpu, self.manifest, images=self._takes_images)
        return buffers.step

    def _buffers_of(self, batch: int) -> CacheBuffers:
        """Those of an earlier batch of this size where any are idle; idle ones of other sizes are given up."""
        kept = None
        while self._idle:
            idle = self._idle.popleft()
            if kept is None and idle.batch == batch:
                kept = idle
            else:
                idle.close()
        if kept is None:
            kept = CacheBuffers(self.manifest, self._gpu, batch)
            self._buffers.add(kept)
        return kept

    def _require_context(self, context: int) -> None:
        require_context(context, self.manifest.model.max_context)
        if context > self.max_context:
            raise ContextError(
                f"a context of {context} tokens was asked for, but {self._bundle.root} was built for at most "
                f"{self.max_context}",
                hint=f"build it again with --context {context}, or ask for fewer tokens",
            )


def _flavour(manifest: Manifest) -> Flavour:
    flavour = manifest.settings.get("flavour")
    if flavour not in MODULES:
        raise BundleError(
            f"settings.flavour must be one of {', '.join(MODULES)}, but got {flavour!r}", hint="build the bundle again"
        )
    return flavour


def build_command(manifest: Manifest) -> str:
    """What a user typed to build such a bundle, as far as it tells."""
    return f"{_BUILD} --size {manifest.model.name}"


def _kernels(bundle: Bundle) -> KernelStore:
    """The bundle's kernels, loaded onto this GPU, which must be one that the plans were built for."""
    manifest = bundle.manifest
    name = manifest.settings.get("kernels")
    if not isinstance(name, str):
        raise BundleError(f"settings.kernels must name a file, but got {name!r}", hint="build the bundle again")
    path = bundle.path(name)
    store = KernelStore.open(path.parent, name=path.name, build_command=build_command(manifest))
    check_architecture(manifest, GpuDevice())
    store.load()
    return store


def check_architecture(manifest: Manifest, device: GpuDevice) -> None:
    """Raises HostError where the plans are not for this GPU."""
    number = device.architecture
    if f"sm_{number}" in manifest.gpu_architectures:
        return
    flavour = _flavour(manifest)
    problem = f"the plans are for {', '.join(manifest.gpu_architectures)}, but {device.name} is sm_{number}"
    if flavour == "rtx" and number not in ARCHITECTURES["rtx"]:
        raise HostError(
            f"{problem}, which TensorRT for RTX does not run on",
            hint=f"build on this host with full TensorRT: {build_command(manifest)} --flavour full --arch sm_{number}",
        )
    raise HostError(problem, hint=f"build for this GPU: {build_command(manifest)} --arch sm_{number}")
