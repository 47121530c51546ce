"""A session whose stages are interpreted: the contract of every session, on a host that cannot run the plan.

Legend: B batch, S tokens in a chunk, R rows of logits, V vocabulary, H hidden, M image feature rows, N pictures,
T tokens a picture.

It takes longer chunks and larger batches than the plan's profiles: the network itself sets no such limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphs.trt.interpreter.interpreter import Interpreter
from graphs.trt.interpreter.program import Program
from graphs.trt.interpreter.rule import kept_dtype
from graphs.trt.interpreter.weights import FileWeights, InitializerWeights
from graphs.trt.network import describe, parse
from graphs.trt.report import NetworkReport
from runtimes.bundle import Bundle
from runtimes.errors import UsageError
from runtimes.manifest import Manifest
from runtimes.session import Caches, Chunk, Rows, Session, require_context
from runtimes.trt import register_plugins

PROVIDER = "interpreter"
_CACHE = "cache."


class InterpretedCaches(Caches):
    """Buffers by the names of the network's inputs. Those of global layers have all slots from the start."""

    def __init__(self, buffers: Mapping[str, Tensor], *, batch: int, context: int) -> None:
        size = sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())
        super().__init__(batch=batch, context=context, bytes_allocated=size)
        self.buffers = dict(buffers)

    def rows(self, sequence: int) -> dict[str, Tensor]:
        """The buffers of one sequence, as views."""
        return {name: buffer[sequence : sequence + 1] for name, buffer in self.buffers.items()}


class InterpretedSession(Session):
    """See the module.

    Args:
        stages: by name, ``decoder`` among them. All are wide, or none is.
    """

    provider = PROVIDER

    def __init__(self, manifest: Manifest, stages: Mapping[str, Interpreter]) -> None:
        self.manifest = manifest
        self._stages = dict(stages)
        self._decoder = stages["decoder"]
        self._shapes = {
            tensor.name: tensor.shape for tensor in self._decoder.program.inputs if tensor.name.startswith(_CACHE)
        }
        layers = enumerate(manifest.model.layers)
        slots = [self._shapes[f"{_CACHE}{index}.k"][2] for index, layer in layers if layer.window is None]
        self.context = min([self.max_context, *slots])
        self._short = kept_dtype("BF16", wide=self._decoder.wide)
        self._takes_images = any(tensor.name == "image_ids" for tensor in self._decoder.program.inputs)

    def open_caches(self, batch: int, context: int) -> InterpretedCaches:
        require_context(context, self.context)
        if batch < 1:
            raise UsageError(f"`batch >= 1` must hold, but got {batch}")
        shapes = {name: (batch, *shape[1:]) for name, shape in self._shapes.items()}
        buffers = {name: torch.zeros(shape, dtype=self._short) for name, shape in shapes.items()}
        return InterpretedCaches(buffers, batch=batch, context=context)

    def grow_caches(self, caches: Caches, context: int) -> bool:
        require_context(context, self.context)
        caches.context = max(caches.context, context)
        return True

    def extend(self, caches: Caches, sequence: int, chunk: Chunk, rows: Rows = "last") -> NDArray[np.float32] | None:
        wanted = np.arange(len(chunk)) if rows == "all" else np.array([len(chunk) - 1])
        logits_RV = self.probe(caches, sequence, chunk, wanted)[0]
        return None if rows is None else logits_RV

    def probe(
        self, caches: Caches, sequence: int, chunk: Chunk, rows: NDArray[np.int64], also: tuple[str, ...] = ()
    ) -> tuple[NDArray[np.float32], ...]:
        """Adds a chunk to one sequence; gives the logits [R, V] at ``rows``, and other tensors of the network in fp32."""
        assert isinstance(caches, InterpretedCaches)
        caches.require_room(sequence, len(chunk))
        feeds = {
            "token_ids": _int64(chunk.token_ids)[None],
            "start": _int64(caches.lengths[sequence : sequence + 1]),
            "length": torch.tensor([len(chunk)]),
            "rows": _int64(rows)[None],
        }
        outputs = self._decoder.run(feeds | caches.rows(sequence) | self._images(chunk), also=also)
        caches.lengths[sequence] += len(chunk)
        return tuple(outputs[name].float().numpy()[0] for name in ("logits", *also))

    def step(
        self, caches: Caches, token_ids: NDArray[np.int64], active: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        assert isinstance(caches, InterpretedCaches)
        running = np.ones(caches.batch, dtype=np.bool_) if active is None else active
        for sequence in np.flatnonzero(running):
            caches.require_room(int(sequence), 1)
        tokens = np.where(running, token_ids, self.manifest.model.tokens.pad)
        feeds = {
            "token_ids": _int64(tokens)[:, None],
            # A linear cache takes the row of an idle sequence too, past its end; where it is full, its last one.
            "start": _int64(np.minimum(caches.lengths, self.context - 1)),
            "length": _int64(running),
            "rows": torch.zeros(caches.batch, 1, dtype=torch.int64),
        }
        outputs = self._decoder.run(feeds | caches.buffers | self._no_images(caches.batch, 1))
        caches.lengths += running
        logits_BV: NDArray[np.float32] = outputs["logits"].numpy()[:, 0]
        return logits_BV

    def encode_images(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        rows_NTH = self.probe_images(pixels)[0]
        return rows_NTH.reshape(-1, rows_NTH.shape[-1])

    def probe_images(self, pixels: NDArray[np.float32], also: tuple[str, ...] = ()) -> tuple[NDArray[np.float32], ...]:
        """Features [N, T, H] of pictures, one at a time, and other tensors of the tower, in fp32."""
        if "vision" not in self._stages:
            raise UsageError(
                f"a picture was given, but this bundle of {self.manifest.model.name!r} is text-only",
                hint="leave the picture out, or build a size from 4b up",
            )
        found = []
        for picture in torch.split(torch.from_numpy(pixels.astype(np.float32)).to(self._short), 1):
            outputs = self._stages["vision"].run({"pixels": picture}, also=also)
            found.append([outputs[name].float().numpy() for name in ("features", *also)])
        return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))

    def close(self) -> None:
        self._stages.clear()

    def _images(self, chunk: Chunk) -> dict[str, Tensor]:
        if chunk.features is None or chunk.feature_rows is None or chunk.image_ids is None:
            return self._no_images(1, len(chunk))
        if not self._takes_images:
            raise UsageError("a chunk has a picture, but the decoder takes none", hint="leave the picture out")
        return {
            "features": torch.from_numpy(chunk.features.astype(np.float32)).to(self._short),
            "feature_rows": _int64(chunk.feature_rows)[None],
            "image_ids": _int64(chunk.image_ids)[None],
        }

    def _no_images(self, batch: int, tokens: int) -> dict[str, Tensor]:
        """What a decoder that takes images gets for text: a row of features that no token reads."""
        if not self._takes_images:
            return {}
        nothing = torch.full((batch, tokens), -1)
        features = torch.zeros(1, self.manifest.model.hidden_size, dtype=self._short)
        return {"features": features, "feature_rows": nothing, "image_ids": nothing}


def _int64(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64))


@dataclass(frozen=True, kw_only=True, eq=False)
class InterpretedBundle:
    """The networks of a bundle's stages, read once for sessions in bf16 and in fp32.

    ``reports`` say what is in each, as a build says it of the network that it made a plan from.
    """

    manifest: Manifest
    programs: Mapping[str, Program]
    weights: FileWeights
    constants: Mapping[str, InitializerWeights]
    reports: Mapping[str, NetworkReport]

    @classmethod
    def open(cls, trt: ModuleType, bundle: Bundle) -> InterpretedBundle:
        """Parses the graphs as the build did, plugins included. Nothing of CUDA is called.

        Raises:
            ParseError: this TensorRT does not take what another one took.
            InterpreterError: a layer is unknown.
            BundleError: a file cannot be read.
        """
        register_plugins(trt, None)
        programs, constants, reports = {}, {}, {}
        for name, facts in bundle.manifest.stages.items():
            graph = bundle.path(facts.graph)
            # No warnings: they are of what is read on purpose, an attribute where an input takes its place.
            parsed = parse(trt, graph, logger=trt.Logger(trt.Logger.ERROR))
            reports[name] = describe(parsed)  # before the layers get their classes, which change what `type` is
            programs[name] = Program.read(parsed)
            constants[name] = InitializerWeights(graph)
        return cls(
            manifest=bundle.manifest,
            programs=programs,
            weights=FileWeights(bundle.path(bundle.manifest.weights.file)),
            constants=constants,
            reports=reports,
        )

    def session(self, *, wide: bool = False) -> InterpretedSession:
        """A session over the networks; ``wide``: bf16 is fp32 everywhere."""
        stages = {
            name: Interpreter(program, weights=self.weights, constants=self.constants[name], wide=wide)
            for name, program in self.programs.items()
        }
        return InterpretedSession(self.manifest, stages)
