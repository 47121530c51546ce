"""Small programs for tests of one pass or one rule: a module exported with its own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim

from graphs.program import Program, program_from_export
from graphs.stages import Stage, TensorSpec
from graphs.weights import BlockFormat, Weight


class Body(nn.Module):
    """A function of tensors, as torch.export wants it."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> object:
        return self.function(*tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class Small:
    """A program with the inputs it was made from and what torch gives for them."""

    program: Program
    inputs: Mapping[str, Tensor]
    expected: tuple[Tensor, ...]
    state: Mapping[str, Tensor]

    def read(self, weight: Weight) -> Tensor:
        """The weight as its recipe says, from the module's own parameters."""
        return torch.cat([self.state[source] for source in weight.sources]) + weight.offset

    def outputs(self) -> tuple[Tensor, ...]:
        """What the program gives now."""
        return tuple(self.program.run(self.inputs, self.read).values())

    def same_as_before(self) -> bool:
        """Whether the program still gives every bit that torch gave before any pass."""
        return all(torch.equal(ours, theirs) for ours, theirs in zip(self.outputs(), self.expected, strict=True))


def small_program(
    module: nn.Module | Callable[..., object],
    *tensors: Tensor,
    dynamic: Sequence[Mapping[int, str]] | None = None,
    formats: Mapping[str, BlockFormat] | None = None,
) -> Small:
    """Exports ``module`` over ``tensors``; ``dynamic`` names the dimensions of each tensor that stay open."""
    module = module if isinstance(module, nn.Module) else Body(module)
    module = module.eval().requires_grad_(False)
    names = dynamic or [{} for _ in tensors]
    dims = {name: Dim(name, min=1) for axes in names for name in axes.values()}
    shapes = tuple({axis: dims[name] for axis, name in axes.items()} for axes in names)
    takes_many = isinstance(module, Body)
    exported = torch.export.export(module, tensors, dynamic_shapes=(shapes,) if takes_many else shapes, strict=False)
    result = module(*tensors)
    expected = result if isinstance(result, tuple) else (result,)
    inputs = tuple(
        TensorSpec(
            name=f"in.{i}",
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(names[i].get(axis, size) for axis, size in enumerate(tensor.shape)),
        )
        for i, tensor in enumerate(tensors)
    )
    outputs = tuple(
        TensorSpec(
            name=f"out.{i}",
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(f"out{i}_{axis}" for axis in range(tensor.dim())),
        )
        for i, tensor in enumerate(expected)
    )
    stage = Stage(name="decoder", inputs=inputs, outputs=outputs)
    program = program_from_export(exported, stage, prefix="", formats=formats or {})
    given = {spec.name: tensor for spec, tensor in zip(inputs, tensors, strict=True)}
    return Small(program=program, inputs=given, expected=expected, state=dict(module.named_parameters()))
