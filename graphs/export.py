"""``torch.export`` of a stage, without weights in memory.

The model is built on the meta device by the caller; here its parameters become fake tensors, so a
27B model is traced in some hundred megabytes. What comes out is one ExportedProgram whose
placeholders carry the stage's names (inputs) and the canonical tensor names (parameters).
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphs.stages import Stage, TensorSpec
from runtimes.errors import ExportError

EXAMPLE_SIZES = {"B": 2, "S": 5, "R": 3, "L": 18, "C": 40, "M": 8, "N": 2}
"""Sizes of the example that is traced: all different from each other's products and from 0 and 1."""


class StageModule(nn.Module):
    """A stage's flat signature over the nested one of the eager model's ``forward``."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.model = model
        self.stage = stage

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.stage.name == "vision":
            return (self.model(*tensors),)
        given = dict(zip((spec.name for spec in self.stage.inputs), tensors, strict=True))
        layers = sum(name.startswith("cache.") for name in given) // 2
        caches = [(given[f"cache.{i}.k"], given[f"cache.{i}.v"]) for i in range(layers)]
        image = (given.get("features"), given.get("feature_rows"), given.get("image_ids"))
        logits, caches = self.model(given["token_ids"], given["start"], given["length"], given["rows"], caches, *image)
        return (logits, *(tensor for pair in caches for tensor in pair))


def example(spec: TensorSpec, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor of the shape that ``spec`` takes in the traced example."""
    shape = [EXAMPLE_SIZES[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    with mode:
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def fake_parameters(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    """Every parameter of a meta model replaced by a fake CPU tensor of ``dtype``."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            with mode:
                fake = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=False))
    return model


def export_stage(model: nn.Module, stage: Stage, *, dtype: torch.dtype = torch.float32) -> ExportedProgram:
    """Traces ``model`` (on the meta device) over the stage's inputs.

    Raises:
        ExportError: torch.export refused; the message carries torch's own reason.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
    module = StageModule(fake_parameters(model, mode, dtype), stage).eval()
    dims = {symbol: Dim(symbol, min=1) for symbol in EXAMPLE_SIZES}
    shapes = tuple({i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in stage.inputs)
    arguments = tuple(example(spec, mode) for spec in stage.inputs)
    try:
        with torch.no_grad(), mode:
            return torch.export.export(module, arguments, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # torch.export raises many types; all mean that the stage cannot be traced
        raise ExportError(
            f"torch.export of stage `{stage.name}` failed: {error}",
            hint="this is a fault of the eager model or of this torch version; see docs/architecture.md",
        ) from error
