"""The stages of one model as lowered graphs: export, passes, lowering, in that order.

Needs no weights and no GPU: the model is built on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from gemma3_compile.config import ModelConfig
from gemma3_compile.facts import decoder_shape, vision_shape
from gemma3_compile.model import Gemma3
from graphs.export import export_stage
from graphs.onnx_lowering.context import OrtOptions, TrtOptions
from graphs.onnx_lowering.lower import LoweredStage, lower_for_ort, lower_for_trt
from graphs.passes import run_passes
from graphs.program import Program, program_from_export
from graphs.stages import Stage, decoder_stage, vision_stage
from graphs.weights import BlockFormat
from runtimes.errors import UsageError
from runtimes.progress import SILENT, Progress

NOT_FOR_TRT = ("fuse_add_norm",)
"""Passes that the ``trt`` dialect leaves out: TensorRT fuses a sum with the norm after it by itself."""


@dataclass(frozen=True, kw_only=True)
class CompiledStage:
    """A stage's contract and its graph in the dialect of one target."""

    stage: Stage
    lowered: LoweredStage


def stages_of(config: ModelConfig) -> tuple[Stage, ...]:
    """The stages that a model has: the text decoder, and with a vision tower the two for pictures."""
    shape = decoder_shape(config)
    text = decoder_stage(shape, image=False)
    if config.vision is None:
        return (text,)
    return text, decoder_stage(shape, image=True), vision_stage(vision_shape(config))


def trt_stages_of(config: ModelConfig, options: TrtOptions) -> tuple[Stage, ...]:
    """The stages of a TensorRT bundle: one decoder, for images too where the model sees any, and the vision tower.

    Raises:
        UsageError: the options ask for more context than the model has.
    """
    text, dtype = config.text, options.dtype
    context = text.max_context if options.context is None else options.context
    if not 1 <= context <= text.max_context:
        raise UsageError(f"`context` must lie in 1 to {text.max_context} for {config.name}, but got {context}")
    shape = decoder_shape(config, local=text.sliding_window, context=context, dtype=dtype)
    decoder = decoder_stage(shape, image=config.vision is not None, name="decoder")
    return (decoder,) if config.vision is None else (decoder, vision_stage(vision_shape(config, dtype=dtype)))


def optimized_program(
    config: ModelConfig,
    stage: Stage,
    formats: Mapping[str, BlockFormat],
    *,
    without_passes: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Program:
    """The stage exported and rewritten by the passes, ready for any lowering. ``dtype`` is that of plain weights."""
    part = "vision" if stage.name == "vision" else "decoder"
    with torch.device("meta"):
        model = Gemma3(config).eval()
    exported = export_stage(getattr(model, part), stage, dtype=dtype)
    program = program_from_export(exported, stage, prefix=f"{part}.", formats=formats)
    run_passes(program, without=without_passes)
    return program


def compile_for_ort(
    config: ModelConfig,
    formats: Mapping[str, BlockFormat],
    options: OrtOptions,
    *,
    without_passes: Collection[str] = (),
    progress: Progress = SILENT,
) -> tuple[CompiledStage, ...]:
    """Every stage of ``config`` in the ``ort`` dialect."""

    def compiled(stage: Stage) -> LoweredStage:
        program = optimized_program(config, stage, formats, without_passes=without_passes)
        return lower_for_ort(program, options)

    return _each(stages_of(config), compiled, progress)


def compile_for_trt(
    config: ModelConfig,
    formats: Mapping[str, BlockFormat],
    options: TrtOptions,
    *,
    without_passes: Collection[str] = (),
    progress: Progress = SILENT,
) -> tuple[CompiledStage, ...]:
    """Every stage of ``config`` in the ``trt`` dialect, for TensorRT's ONNX parser."""
    left_out = {*without_passes, *NOT_FOR_TRT}

    def compiled(stage: Stage) -> LoweredStage:
        dtype = getattr(torch, options.dtype)
        program = optimized_program(config, stage, formats, without_passes=left_out, dtype=dtype)
        return lower_for_trt(program, options)

    return _each(trt_stages_of(config, options), compiled, progress)


def _each(
    stages: tuple[Stage, ...], compiled: Callable[[Stage], LoweredStage], progress: Progress
) -> tuple[CompiledStage, ...]:
    done = []
    with progress.task("compiling graphs", total=len(stages)) as advance:
        for stage in stages:
            done.append(CompiledStage(stage=stage, lowered=compiled(stage)))
            advance(1)
    return tuple(done)
