"""The stages of one model as lowered graphs: export, passes, lowering, in that order.

Needs no weights and no GPU: the model is built on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from gemma3_compile.config import ModelConfig
from gemma3_compile.facts import decoder_shape, vision_shape
from gemma3_compile.model import Gemma3
from graphs.export import export_stage
from graphs.onnx_lowering.context import OrtOptions
from graphs.onnx_lowering.lower import LoweredStage, lower_for_ort
from graphs.passes import run_passes
from graphs.program import Program, program_from_export
from graphs.stages import Stage, decoder_stage, vision_stage
from graphs.weights import BlockFormat
from runtimes.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class CompiledStage:
    """A stage's contract and its graph for ONNX Runtime."""

    stage: Stage
    lowered: LoweredStage


def stages_of(config: ModelConfig) -> tuple[Stage, ...]:
    """The stages that a model has: the text decoder, and with a vision tower the two for pictures."""
    shape = decoder_shape(config)
    text = decoder_stage(shape, image=False)
    if config.vision is None:
        return (text,)
    return text, decoder_stage(shape, image=True), vision_stage(vision_shape(config))


def optimized_program(
    config: ModelConfig, stage: Stage, formats: Mapping[str, BlockFormat], *, without_passes: Collection[str] = ()
) -> Program:
    """The stage exported and rewritten by the passes, ready for any lowering."""
    part = "vision" if stage.name == "vision" else "decoder"
    with torch.device("meta"):
        model = Gemma3(config).eval()
    exported = export_stage(getattr(model, part), stage)
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
    stages = stages_of(config)
    compiled = []
    with progress.task("compiling graphs", total=len(stages)) as advance:
        for stage in stages:
            program = optimized_program(config, stage, formats, without_passes=without_passes)
            compiled.append(CompiledStage(stage=stage, lowered=lower_for_ort(program, options)))
            advance(1)
    return tuple(compiled)
