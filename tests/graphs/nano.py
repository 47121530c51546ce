"""The nano model's stages, exported once for all tests, and run in torch on made-up inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from gemma3_compile.config import ModelConfig
from gemma3_compile.model import Gemma3
from gemma3_compile.presets import preset
from gemma3_compile.stage_graphs import stages_of
from graphs.export import StageModule, export_stage
from graphs.passes import run_passes
from graphs.program import Program, program_from_export
from graphs.stages import Stage
from graphs.weights import BlockFormat, Weight

STAGES = ("decoder", "decoder_image", "vision")
WINDOW = 16
"""Slots of an eager local layer; a compact cache may have more."""
Inputs = dict[str, Tensor]


def part_of(stage: str) -> str:
    """The half of the model that a stage runs."""
    return "vision" if stage == "vision" else "decoder"


@cache
def nano_stage(name: str) -> Stage:
    """A stage's contract."""
    return {stage.name: stage for stage in stages_of(preset("nano"))}[name]


@cache
def exported(name: str) -> ExportedProgram:
    """A stage of nano as torch.export gives it. Shared: ``program_from_export`` copies it."""
    with torch.device("meta"):
        model = Gemma3(preset("nano")).eval()
    return export_stage(getattr(model, part_of(name)), nano_stage(name))


def raw_program(name: str, formats: Mapping[str, BlockFormat] | None = None) -> Program:
    """A fresh program before any pass."""
    return program_from_export(exported(name), nano_stage(name), prefix=f"{part_of(name)}.", formats=formats or {})


def nano_program(name: str, formats: Mapping[str, BlockFormat] | None = None) -> Program:
    """A fresh program after all passes."""
    program = raw_program(name, formats)
    run_passes(program)
    return program


def reader(model: nn.Module) -> Callable[[Weight], Tensor]:
    """Reads a recipe from ``model``'s own tensors."""
    state = model.state_dict()
    return lambda weight: torch.cat([state[source] for source in weight.sources]) + weight.offset


def stage_inputs(name: str, seed: int = 0) -> Inputs:
    """Inputs of sizes that the stage was not traced with: three sequences, unequal, one of them idle."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"B": 3, "S": 7, "R": 2, "L": WINDOW, "C": 32, "M": 8, "N": 3}
    inputs: Inputs = {}
    for spec in nano_stage(name).inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        if spec.dtype == "float32":
            inputs[spec.name] = torch.randn(shape, generator=generator)
        else:
            inputs[spec.name] = torch.randint(500, shape, generator=generator)
    if name != "vision":
        inputs["start"] = torch.tensor([0, 3, 20])
        inputs["length"] = torch.tensor([7, 5, 0])
        inputs["rows"] = torch.tensor([[6, 0], [4, 1], [0, 0]])
    if name == "decoder_image":
        inputs["image_ids"] = torch.tensor([[-1, 0, 0, 0, 0, -1, 1]] * 3)
        inputs["feature_rows"] = torch.tensor([[-1, 0, 1, 2, 3, -1, 4]] * 3)
    return inputs


def eager_outputs(model: Gemma3, name: str, inputs: Inputs) -> dict[str, Tensor]:
    """What the eager model gives for a stage's inputs, by the stage's names."""
    stage = nano_stage(name)
    outputs = StageModule(getattr(model, part_of(name)), stage)(*(inputs[spec.name] for spec in stage.inputs))
    return dict(zip((spec.name for spec in stage.outputs), outputs, strict=True))


def linear_names(config: ModelConfig) -> list[str]:
    """Canonical names of the linear weights of both halves."""
    with torch.device("meta"):
        return [
            n for n, _ in Gemma3(config).named_parameters() if n.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))
        ]
