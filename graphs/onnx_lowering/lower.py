"""Lowers a Program to an ONNX model whose weights are references into one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import fx

from graphs.onnx_lowering import math_rules, ort_rules, shape_rules
from graphs.onnx_lowering.builder import DTYPES, Builder, WeightUse
from graphs.onnx_lowering.context import Context, OrtOptions, merge_tables
from graphs.program import Program
from graphs.weights import StoredTensor
from runtimes.errors import ExportError

ORT_RULES = merge_tables(shape_rules.RULES, math_rules.RULES, ort_rules.RULES)


@dataclass(frozen=True, kw_only=True)
class LoweredStage:
    """An ONNX model without weights, what it wants of the weights file, and the names of its probes."""

    model: ir.Model
    weight_uses: tuple[WeightUse, ...]
    probes: Mapping[str, str]

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The entries of the weights file that this stage reads."""
        return tuple(dict.fromkeys(use.entry for use in self.weight_uses))


def lower_for_ort(program: Program, options: OrtOptions) -> LoweredStage:
    """Lowers ``program`` in the ``ort`` dialect."""
    builder = Builder()
    ctx = Context(builder=builder, options=options, weights=program.weights, rules=ORT_RULES)
    for node, spec in zip(program.input_nodes(), program.stage.inputs, strict=True):
        ctx.values[node] = builder.input(spec.name, spec.dtype, spec.shape)
    outputs = ctx.lower(program.graph)
    values = _name_outputs(ctx, program, outputs)
    model = builder.model(program.stage.name, values)
    used = {value.name for value in model.graph.initializers.values()}
    probes = {name: str(ctx.value(node).name) for name, node in program.probes.items()}
    uses = tuple(use for use in builder.weight_uses.values() if use.value.name in used)
    return LoweredStage(model=model, weight_uses=uses, probes=probes)


def _name_outputs(ctx: Context, program: Program, outputs: object) -> list[ir.Value]:
    assert isinstance(outputs, list | tuple)
    named: list[ir.Value] = []
    for node, spec in zip(outputs, program.stage.outputs, strict=True):
        assert isinstance(node, fx.Node)
        value = ctx.value(node)
        if value in named or value in ctx.builder.inputs:
            raise ExportError(f"output `{spec.name}` is not a value of its own: node `{node.name}`")
        value.name = spec.name
        value.type, value.shape = ir.TensorType(DTYPES[spec.dtype]), ir.Shape(spec.shape)
        named.append(value)
    return named


def bind_weights(lowered: LoweredStage, *, file: str, offsets: Mapping[str, int], folder: Path) -> None:
    """Points every initializer into ``file``; ``offsets`` gives each entry's first byte."""
    for use in lowered.weight_uses:
        use.value.const_value = ir.ExternalTensor(
            location=file,
            offset=offsets[use.entry.name],
            length=use.entry.size_bytes,
            dtype=DTYPES[use.entry.dtype],
            shape=ir.Shape(use.shape),
            name=str(use.value.name),
            base_dir=folder,
        )
