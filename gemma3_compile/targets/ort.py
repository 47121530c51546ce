"""ONNX Runtime: the graphs are all."""

from __future__ import annotations

from typing import cast

from gemma3_compile.build_request import BuildRequest, only_for
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.config import ModelConfig, TextConfig
from gemma3_compile.formats import Dtype, choose_formats, default_activations, stored_dtype
from gemma3_compile.stage_graphs import CompiledStage, compile_for_ort
from gemma3_compile.targets.target import Formats, Target, TargetFacts, cache_numbers
from graphs.onnx_lowering.context import OrtOptions
from graphs.weights import BlockFormat
from runtimes.errors import UsageError
from runtimes.manifest import CacheFacts, Scalar, WeightFacts
from runtimes.progress import SILENT, Progress

PREFILL_CHUNK = 1024
"""Tokens of a prompt at a time: MatMulNBits unpacks its weights once for all of them."""


class OrtTarget(Target):
    """Graphs for ONNX Runtime, on CPUs and through its CUDA provider."""

    def __init__(self, request: BuildRequest) -> None:
        foreign = {"flavour": request.flavour, "arch": request.architectures, "weights": request.weights}
        message = only_for("trt", foreign | {"chunk": request.chunk, "batch": request.batch})
        if message is not None:
            raise UsageError(message, hint="leave that out, or pass --target trt")
        self._request = request
        self._dtype = cast(Dtype, request.dtype)  # `formats` refuses what it is not
        self._options = OrtOptions(activations=request.activations or default_activations(self._dtype))

    def formats(self, checkpoint: Checkpoint) -> dict[str, BlockFormat]:
        return choose_formats(checkpoint, self._dtype)

    def compile(self, config: ModelConfig, formats: Formats, progress: Progress = SILENT) -> tuple[CompiledStage, ...]:
        return compile_for_ort(config, formats, self._options, progress=progress)

    def facts(self, config: ModelConfig, formats: Formats, *, weights: str, ledger: str) -> TargetFacts:
        settings: dict[str, Scalar] = {
            "image_in_place": True,
            "graph_optimization": "all",
            "window_slack": window_slack(config.text),
            "prefill_chunk": PREFILL_CHUNK,
        }
        if formats:
            settings["activations"] = self._options.activations
        return TargetFacts(
            target="ort",
            caches=CacheFacts(dtype="float32", local_layout="compact"),
            weights=WeightFacts(file=weights, dtype=stored_dtype(dict(formats), self._dtype), ledger=ledger),
            settings=settings,
        )

    def context(self, config: ModelConfig) -> int:
        context = self._request.context or config.text.max_context
        if context > config.text.max_context:
            raise UsageError(f"the context {context} is longer than the {config.text.max_context} of {config.name}")
        return context

    def cache_bytes(self, config: ModelConfig, context: int) -> int:
        return cache_bytes(config.text, context)


def window_slack(text: TextConfig) -> int:
    """Slots that a local layer gets beyond its window, so that a full cache moves its rows once in that many tokens."""
    return max(1, text.sliding_window // 16)


def cache_bytes(text: TextConfig, context: int) -> int:
    """Keys and values of one sequence in fp32: the window and its slack on local layers, ``context`` on global ones."""
    local = text.sliding_window + window_slack(text)
    return cache_numbers(text, local=local, context=context) * 4
