"""A bundle's own graphs with the residual stream let out, and products in fp32.

Legend: B batch (1), S tokens of a piece, H hidden, R rows of logits, V vocabulary, L layers, C context,
N images, P patches.

A copy of the ONNX graph is made in memory and handed to ONNX Runtime as bytes, with the bundle's folder as the place
of its weights: nothing is written anywhere. In the copy the values that the manifest's ``probes`` names are outputs,
and MatMulNBits keeps its activations in fp32, so that what is left of an error is the graph's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma3_compile.validate.cases import Passage
from runtimes.bundle import Bundle
from runtimes.errors import BundleError, HostError
from runtimes.ort_caches import OrtCaches
from runtimes.ort_options import choose_provider, onnxruntime, session_options, translated
from runtimes.session import Chunk, Provider

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_ALL_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_FP32_ACTIVATIONS = 1
HEAD_ROWS = 8
"""Logits are compared at so many tokens of a piece, the first and the last among them."""

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbedPiece:
    """What the bundle computed for one piece of a passage.

    Args:
        bounds: (from, up to) in the passage.
        after: the residual stream [S, H] after each layer.
        rows: which tokens of the piece the logits are of.
        logits_RV: fp32.
    """

    bounds: tuple[int, int]
    after: tuple[Array, ...]
    rows: NDArray[np.int64]
    logits_RV: Array


class Probed(Protocol):
    """A bundle that gives out the residual stream between its layers.

    Attributes:
        in_fp32: whether all that is probed is computed in fp32, so that an error is the graph's.
    """

    in_fp32: bool

    def probes(self, stage: str) -> tuple[str, ...]:
        """The names of the probed values; empty where the bundle has none."""

    def run_passage(self, passage: Passage, stage: str, features_MH: Array | None) -> Iterator[ProbedPiece]:
        """The passage piece by piece through one stage, each piece with its probes."""

    def run_vision(self, pixels_N3YX: Array) -> tuple[list[Array], Array]:
        """The residual stream [N, P, H] after each layer, and the features [N, T, X]."""


def probed_rows(size: int) -> NDArray[np.int64]:
    """Which tokens of a piece the logits are compared at."""
    return np.unique(np.linspace(0, size - 1, min(size, HEAD_ROWS)).round().astype(np.int64))


class ProbedBundle:
    """Runs stages of a bundle with their probes.

    Raises:
        BundleError: a graph cannot be read, or lacks a value that the manifest's ``probes`` names.
    """

    def __init__(self, bundle: Bundle, *, provider: Provider = "auto", threads: int | None = None) -> None:
        self._bundle, self._threads = bundle, threads
        self._provider = choose_provider(provider, bundle.manifest)
        self._graphs: dict[str, Any] = {}
        self.in_fp32 = bundle.manifest.caches.dtype == "float32"

    def probes(self, stage: str) -> tuple[str, ...]:
        """The names of the probed values; empty where the bundle has none."""
        return tuple(self._bundle.manifest.probes.get(stage, ()))

    def run_passage(self, passage: Passage, stage: str, features_MH: Array | None) -> Iterator[ProbedPiece]:
        """The passage piece by piece through one stage, each piece with its probes.

        ``decoder_image`` gets its text too, with -1 for every token, so that no other stage's work mixes in.
        """
        caches = OrtCaches(self._bundle.manifest, batch=1, context=len(passage), provider=self._provider)
        names = self.probes(stage)
        for begin, end in passage.pieces():
            size = end - begin
            rows = probed_rows(size)
            feeds: dict[str, Any] = {
                "token_ids": passage.token_ids[None, begin:end],
                "start": np.array([begin]),
                "length": np.array([size]),
                "rows": np.arange(size)[None],  # of all tokens: the last layer's probe has the rows that are asked for
            }
            if stage == "decoder_image":
                feeds |= self._image_feeds(passage.chunk(begin, end, features_MH))
            logits_1RV, *after = self._run_decoder(stage, ["logits", *names], feeds, caches)
            yield ProbedPiece(
                bounds=(begin, end),
                after=tuple(after_1SH[0] for after_1SH in after),
                rows=rows,
                logits_RV=logits_1RV[0][rows],
            )

    def run_vision(self, pixels_N3YX: Array) -> tuple[list[Array], Array]:
        """The residual stream [N, P, H] after each layer, and the features [N, T, X]; a picture at a time."""
        outputs = [*self.probes("vision"), "features"]
        graph, found = self._graph("vision"), []
        for pixels_1 in np.split(pixels_N3YX, len(pixels_N3YX)):
            with translated(HostError, "the stage 'vision' failed in ONNX Runtime when it was probed"):
                found.append(graph.run(outputs, {"pixels": pixels_1}))
        *after, features_NTX = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return after, features_NTX

    def _image_feeds(self, chunk: Chunk) -> dict[str, Any]:
        if chunk.feature_rows is not None and chunk.image_ids is not None:
            rows = {"feature_rows": chunk.feature_rows[None], "image_ids": chunk.image_ids[None]}
            return {"features": chunk.features, **rows}
        text = np.full((1, len(chunk)), -1, dtype=np.int64)
        unused = np.zeros((1, self._bundle.manifest.model.hidden_size), dtype=np.float32)
        return {"features": unused, "feature_rows": text, "image_ids": text}

    def _run_decoder(self, stage: str, outputs: list[str], feeds: dict[str, Any], caches: OrtCaches) -> list[Array]:
        """Runs a piece over ``caches``, which are bound as a session binds them: in place where the graph is."""
        binding = self._graph(stage).io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in outputs:
            binding.bind_output(name, "cpu")
        in_place = stage == "decoder" or bool(self._bundle.manifest.settings.get("image_in_place", False))
        caches.bind(binding, sequence=0, in_place=in_place)
        aside = None if in_place else caches.bind_aside(binding)
        with translated(HostError, f"the stage {stage!r} failed in ONNX Runtime when it was probed"):
            self._graph(stage).run_with_iobinding(binding)
        if aside is not None:
            caches.take(aside, 0)
        return [value.numpy() for value in binding.get_outputs()[: len(outputs)]]

    def _graph(self, stage: str) -> Any:
        if stage not in self._graphs:
            self._graphs[stage] = self._open(stage)
        return self._graphs[stage]

    def _open(self, stage: str) -> Any:
        name = self._bundle.manifest.stages[stage].graph
        model = _probed_copy(self._bundle, name, self.probes(stage))
        options = session_options(self._bundle.manifest.settings, self._threads)
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(self._bundle.root.absolute()))
        with translated(BundleError, f"{name} cannot be loaded with its probes"):
            return onnxruntime().InferenceSession(model, options, providers=_ALL_PROVIDERS[self._provider])


def _probed_copy(bundle: Bundle, name: str, probes: tuple[str, ...]) -> bytes:
    """The graph ``name`` with ``probes`` as outputs and MatMulNBits' activations in fp32."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(bundle.path(name).read_bytes())
    except (OSError, DecodeError) as error:
        raise BundleError(f"{name} cannot be read: {error}", hint="`gemma3c verify` finds a damaged file") from error
    graph = model.graph
    made = {output for node in graph.node for output in node.output} | {value.name for value in graph.input}
    if absent := [probe for probe in probes if probe not in made]:
        raise BundleError(
            f"{name} has no value {absent[0]!r}, which the manifest names among its probes",
            hint="build the bundle again",
        )
    known = {output.name for output in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=probe) for probe in dict.fromkeys(probes) if probe not in known)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = _FP32_ACTIVATIONS
    model_bytes: bytes = model.SerializeToString()
    return model_bytes
