"""Runs a program: layer after layer, each by its rule; what is not read any more is let go."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphs.trt.interpreter.program import Program
from graphs.trt.interpreter.rule import Call, InterpreterError, Layer, TensorFacts, kept_dtype
from graphs.trt.interpreter.rules import RULES
from graphs.trt.interpreter.weights import FileWeights, InitializerWeights


class Interpreter:
    """See the module.

    Args:
        weights: of the inputs that are not fed; None where all are.
        constants: what TensorRT does not show; None where it shows all.
        wide: keep and compute in fp32 what the network has in bf16: the same network without the rounding.
    """

    def __init__(
        self,
        program: Program,
        *,
        weights: FileWeights | None = None,
        constants: InitializerWeights | None = None,
        wide: bool = False,
    ) -> None:
        self.program, self.wide = program, wide
        self.weights, self.constants = weights, constants
        self._inputs = {tensor.name: tensor for tensor in program.inputs}

    @torch.inference_mode()
    def run(self, feeds: Mapping[str, Tensor], *, also: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Computes all outputs.

        Args:
            feeds: inputs by name. Those that the network updates in place are updated.
            also: other tensors of the network to give out.

        Raises:
            InterpreterError: a tensor is not what the network says of it, or a layer does what TensorRT forbids.
        """
        unknown = sorted(set(feeds) - set(self._inputs))
        if unknown:
            raise InterpreterError(f"the network has no input `{unknown[0]}`")
        for name, value in feeds.items():
            self._check(f"the input `{name}`", value, self._inputs[name])
        values: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for layer, dropped in zip(self.program.layers, self.program.dropped, strict=True):
            given = tuple(None if t is None else self._value(t, feeds, values) for t in layer.inputs)
            self._compute(layer, given, values)
            found |= {name: values[name] for name in also if name in values}
            for name in dropped:
                values.pop(name, None)
        absent = sorted({*also} - set(found))
        if absent:
            raise InterpreterError(f"the network has no tensor `{absent[0]}`")
        return {tensor.name: values[tensor.name] for tensor in self.program.outputs} | found

    def _value(self, tensor: TensorFacts, feeds: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """A computed tensor, an input that was fed, or a weight, which is read anew each time."""
        if tensor.name in values:
            return values[tensor.name]
        if tensor.name in feeds:
            return feeds[tensor.name]
        if self.weights is None:
            raise InterpreterError(f"the input `{tensor.name}` was not fed")
        return self.weights.read(tensor).to(kept_dtype(tensor.dtype, wide=self.wide))

    def _compute(self, layer: Layer, given: tuple[Tensor | None, ...], values: dict[str, Tensor]) -> None:
        call = Call(layer=layer, inputs=given, wide=self.wide, constant=self._constant)
        try:
            outputs = RULES[layer.kind].body(call)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            shapes = [None if value is None else tuple(value.shape) for value in given]
            raise layer.refuse(f"it cannot be computed from {shapes}: {error}") from error
        for value, facts in zip(outputs, layer.outputs, strict=True):
            self._check(f"the layer `{layer.name}` ({layer.kind})", value, facts)
            values[facts.name] = value

    def _check(self, what: str, value: Tensor, facts: TensorFacts) -> None:
        """What the network says of a tensor must be so."""
        fits = len(value.shape) == len(facts.shape) and all(
            wanted in (-1, size) for size, wanted in zip(value.shape, facts.shape, strict=True)
        )
        wanted = kept_dtype(facts.dtype, wide=self.wide)
        if not fits or value.dtype != wanted:
            raise InterpreterError(
                f"{what} gives {value.dtype} {list(value.shape)} where the network has {wanted} {list(facts.shape)} "
                f"(`{facts.name}`)"
            )

    def _constant(self, layer: Layer) -> Tensor:
        if self.constants is None:
            raise layer.refuse("TensorRT does not show its values, and no ONNX file was given")
        return self.constants.read(layer)
