"""Lowers a Program to an ONNX model whose weights are references into one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import fx

from graphs.onnx_lowering import attention_rules, math_rules, ort_rules, shape_rules, trt_plugins, trt_rules
from graphs.onnx_lowering.builder import DTYPES, MICROSOFT, Builder, WeightUse
from graphs.onnx_lowering.context import Context, OrtOptions, TrtOptions, merge_tables
from graphs.program import Program
from graphs.weights import StoredTensor
from runtimes.errors import ExportError

_SHARED = (shape_rules.RULES, math_rules.RULES, attention_rules.RULES)
ORT_RULES = merge_tables(*_SHARED, ort_rules.RULES)
TRT_RULES = merge_tables(*_SHARED, trt_rules.RULES, trt_plugins.RULES)


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
    ctx = Context(builder=Builder(), options=options, weights=program.weights, rules=ORT_RULES)
    return _lower(ctx, program, domains={MICROSOFT: 1})


def lower_for_trt(program: Program, options: TrtOptions) -> LoweredStage:
    """Lowers ``program`` in the ``trt`` dialect."""
    ctx = Context(builder=Builder(), options=options, weights=program.weights, rules=TRT_RULES)
    domains = {trt_plugins.DOMAIN: trt_plugins.DOMAIN_VERSION}
    return _lower(ctx, program, domains=domains, weight_inputs=options.weights == "input", sizes_first=True)


def _lower(
    ctx: Context,
    program: Program,
    *,
    domains: Mapping[str, int],
    weight_inputs: bool = False,
    sizes_first: bool = False,
) -> LoweredStage:
    """Inputs, nodes, outputs. ``sizes_first`` reads dynamic dimensions from the inputs, not from what is computed."""
    builder = ctx.builder
    for node, spec in zip(program.input_nodes(), program.stage.inputs, strict=True):
        ctx.values[node] = builder.input(spec.name, spec.dtype, spec.shape)
        builder.scope(spec.name)
        for axis, size in enumerate(spec.shape):
            if sizes_first and isinstance(size, str):
                ctx.dimension(node, axis)
    outputs = ctx.lower(program.graph)
    values = _name_outputs(ctx, program, outputs)
    model = builder.model(program.stage.name, values, domains=domains, weight_inputs=weight_inputs)
    used = {value.name for value in (*model.graph.initializers.values(), *model.graph.inputs)}
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


def weight_inputs(lowered: LoweredStage) -> dict[str, StoredTensor]:
    """Which entry of the weights file each input of the network takes, by the input's name, which is the entry's."""
    fed = {value.name for value in lowered.model.graph.inputs}
    return {str(use.value.name): use.entry for use in lowered.weight_uses if use.value.name in fed}


def bind_weights(lowered: LoweredStage, *, file: str, offsets: Mapping[str, int], folder: Path) -> None:
    """Points every initializer into ``file``; ``offsets`` gives each entry's first byte. Inputs stay what they are."""
    fed = weight_inputs(lowered)
    for use in lowered.weight_uses:
        if use.value.name in fed:
            continue
        use.value.const_value = ir.ExternalTensor(
            location=file,
            offset=offsets[use.entry.name],
            length=use.entry.size_bytes,
            dtype=DTYPES[use.dtype],
            shape=ir.Shape(use.shape),
            name=str(use.value.name),
            base_dir=folder,
        )
