"""Launches for any size of a call, from :meth:`Kernel.launches`, for hosts without torch and triton.

``launches`` is run once over tensors that have shapes but no data, and whose varying sizes are symbols (torch's SymInt).
Grids, arguments and shapes come out as formulas of the sizes. Where the kernel's Python decides something by a size
(``min(tokens, window)``), or compiles a constant that is one, the decision is noted: what came out holds for the sizes
that decide alike, and a size that decides otherwise makes another piece. Integers that vary are compiled to be taken at any value.

A table of sizes says whether all this is so: at each of them the piece must give exactly what ``launches`` gives there.

Pointers are compiled as multiples of 16: inputs and outputs are whole buffers, or views at an offset that is a multiple
of 16 and does not vary, and whoever launches aligns buffers to 16 bytes at least. Nothing is assumed of varying integers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isclose
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from autotune.ahead_of_time import Compiled, request_of
from autotune.kernel import Case, Config, Kernel, Tensors
from autotune.launch import Launch
from autotune.sympy_text import text_of
from runtimes.errors import Gemma3CompileError
from runtimes.gpu.expression import Values, condition, expression
from runtimes.gpu.kernel_file import (
    KernelArgument,
    KernelLaunch,
    KernelTensor,
    KernelVariant,
    Role,
    TuningFacts,
    hash_of,
)

_NEAR = 1e-12
"""How far a parameter's formula may lie from what the kernel itself passes, relatively."""
_ODD_SIZES = 12
"""Of each dimension, in the table, beside powers of two and their neighbours."""


class TemplateError(Gemma3CompileError):
    """A kernel's launches depend on the sizes in a way that no formula says."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """A size of a case that varies from call to call: its name in formulas, its least and its largest value."""

    name: str
    low: int
    high: int


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number that every call gives and that an argument is made of.

    Args:
        name: in formulas.
        formula: the argument, such as ``scale * 1.4427``.
        value: what it is in the case; the formula must then give what the kernel itself passes.
    """

    name: str
    formula: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One launch: as it is at the sizes of the trace, and as formulas. ``tensors``: name and offset in bytes by argument."""

    launch: Launch
    grid: tuple[str, str, str]
    tensors: Mapping[str, tuple[str, int]]
    values: Mapping[str, str]

    @property
    def varying(self) -> frozenset[str]:
        """Integers that the cubin must take at any value."""
        whole = {name for name, value in self.launch.arguments.items() if isinstance(value, int)}
        return frozenset(name for name, text in self.values.items() if name in whole and expression(text).names)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a kernel launches at all sizes that meet the conditions of ``when``."""

    when: tuple[str, ...]
    tensors: tuple[KernelTensor, ...]
    launches: tuple[Traced, ...]

    def variant(self, compiled: Sequence[Compiled], tuning: TuningFacts, *, when: Sequence[str] = ()) -> KernelVariant:
        """With its cubins, one a launch, all of one architecture.

        Args:
            when: more conditions.

        Raises:
            TemplateError: a cubin asks for something that a template cannot say.
        """
        (architecture,) = {each.architecture for each in compiled}
        launches = tuple(_launch(traced, each) for traced, each in zip(self.launches, compiled, strict=True))
        return KernelVariant(
            architecture=architecture, when=(*when, *self.when), tensors=self.tensors, launches=launches, tuning=tuning
        )


@dataclass(frozen=True, kw_only=True)
class _Question:
    kernel: Kernel
    case: Case
    config: Config
    dimensions: Mapping[str, Dimension]
    parameters: Mapping[str, Parameter]

    def at(self, sizes: Mapping[str, Any]) -> Case:
        """The case at other sizes, by the case's own names."""
        return Case(dtype=self.case.dtype, dims={**self.case.dims, **sizes})

    def values(self, sizes: Mapping[str, int]) -> Values:
        """Of every name in formulas."""
        values: dict[str, int | float] = {self.dimensions[key].name: size for key, size in sizes.items()}
        return values | {parameter.name: parameter.value for parameter in self.parameters.values()}

    def __str__(self) -> str:
        return f"{self.kernel.name}, {self.case}, {self.config}"


def template(
    kernel: Kernel,
    case: Case,
    config: Config,
    dimensions: Mapping[str, Dimension],
    parameters: Mapping[str, Parameter] | None = None,
) -> tuple[Piece, ...]:
    """Pieces that together hold for all sizes in the ranges of ``dimensions``; of those that hold the first is right.

    Args:
        case: its other sizes stay as they are.
        dimensions: by the case's names.
        parameters: by the names of the arguments that they stand for.

    Raises:
        TemplateError: what the kernel launches at some size is not what the formulas say; the message has both.
    """
    question = _Question(kernel=kernel, case=case, config=config, dimensions=dimensions, parameters=parameters or {})
    try:
        return _pieces(question, of_inputs=False)
    except TemplateError:
        # Decisions while inputs are made are mostly torch's own, about strides of a size that is 1, and change nothing;
        # but a kernel may take other tensors at other sizes.
        return _pieces(question, of_inputs=True)


def _pieces(question: _Question, *, of_inputs: bool) -> tuple[Piece, ...]:
    """``of_inputs``: decisions that were made while inputs and outputs were, count too."""
    pieces: list[Piece] = []
    for sizes in _table(question.dimensions):
        values = question.values(sizes)
        if not any(_holds(piece, values) for piece in pieces):
            pieces.append(_traced(question, sizes, of_inputs=of_inputs))
        _check(question, next((piece for piece in pieces if _holds(piece, values)), None), sizes)
    return tuple(pieces)


def _holds(piece: Piece, values: Values) -> bool:
    return all(condition(text)(values) for text in piece.when)


def _table(dimensions: Mapping[str, Dimension]) -> Iterator[dict[str, int]]:
    """Sizes to check at. A size of 1 comes last: torch takes it for a special case, which it seldom is."""
    columns = [_sizes(dimension) for dimension in dimensions.values()]
    rows = sorted(product(*columns), key=lambda row: (1 in row, row))
    yield from (dict(zip(dimensions, row, strict=True)) for row in rows)


def _sizes(dimension: Dimension) -> list[int]:
    low, high = dimension.low, dimension.high
    powers = [2**n + step for n in range(high.bit_length()) for step in (-1, 0, 1) if n % 2 == 0 or step == 0]
    drawn = random.Random(0).choices(range(low, high + 1), k=_ODD_SIZES)
    return sorted({low, min(low + 1, high), max(high - 1, low), high, *(n for n in powers + drawn if low <= n <= high)})


def _traced(question: _Question, sizes: Mapping[str, int], *, of_inputs: bool) -> Piece:
    """The piece that ``sizes`` belong to."""
    env = ShapeEnv(specialize_zero_one=False)
    symbols = {key: _symbol(env, dimension.name, sizes[key]) for key, dimension in question.dimensions.items()}
    names = {symbol.node.expr: question.dimensions[key].name for key, symbol in symbols.items()}
    kernel, config = question.kernel, question.config
    case = question.at(symbols)
    with FakeTensorMode(shape_env=env):
        inputs = kernel.inputs(case, device="meta")
        outputs = kernel.outputs(case, config, device="meta")
        seen = 0 if of_inputs else len(env.guards)
        launches = kernel.launches(case, config, inputs | outputs)
    decisions = [guard.expr for guard in env.guards[seen:]]
    decisions += [sympy.Eq(symbol, value, evaluate=False) for symbol, value in env.replacements.items()]
    decisions += [decision for launch in launches for decision in _constants_fixed(launch)]
    plain = question.at(sizes)
    concrete, _, _ = _launches_at(question, sizes)
    if len(concrete) != len(launches):
        raise TemplateError(f"{question}: {len(launches)} launches of symbols, but {len(concrete)} at {dict(sizes)}")
    tensors = inputs | outputs
    traced = tuple(
        _formulas(question, symbolic, launch, tensors, names)
        for symbolic, launch in zip(launches, concrete, strict=True)
    )
    written = kernel.in_place(plain)
    used = {name for each in traced for name, _ in each.tensors.values()}
    types = {name: kind for each in traced for name, kind in _types(each).items()}
    return Piece(
        when=tuple(dict.fromkeys(text_of(decision, names) for decision in decisions)),
        tensors=tuple(
            KernelTensor(
                name=name,
                type=types[name],
                shape=tuple(text_of(side, names) for side in tensor.shape),
                role=_role(name, outputs, written),
            )
            for name, tensor in tensors.items()
            if name in used
        ),
        launches=traced,
    )


def _symbol(env: ShapeEnv, name: str, hint: int) -> Any:
    source = ConstantSource(name)
    symbol = env.create_symbol(
        hint, source, dynamic_dim=DimDynamic.DYNAMIC, positive=True, do_not_specialize_zero_one=True
    )
    return env.create_symintnode(symbol, hint=hint, source=source)


def _constants_fixed(launch: Launch) -> Iterator[Any]:
    """That constants which depend on a size are what they are here: another value is another cubin, and a piece of its own."""
    constants: Mapping[str, Any] = launch.constants
    for value in constants.values():
        if isinstance(value, torch.SymInt):
            yield sympy.Eq(value.node.expr, value.node.hint, evaluate=False)


def _formulas(
    question: _Question, symbolic: Launch, concrete: Launch, tensors: Tensors, names: Mapping[sympy.Symbol, str]
) -> Traced:
    places, values = {}, {}
    for name, value in symbolic.arguments.items():
        if isinstance(value, Tensor):
            places[name] = _place(value, tensors)
        elif name in question.parameters:
            values[name] = question.parameters[name].formula
        else:
            values[name] = text_of(value, names)
    x, y, z = (text_of(side, names) for side in symbolic.grid)
    return Traced(launch=concrete, grid=(x, y, z), tensors=places, values=values)


def _place(value: Tensor, tensors: Tensors) -> tuple[str, int]:
    """Which tensor an argument points into, and how many bytes from its beginning."""
    for name, tensor in tensors.items():
        if tensor is value:
            return name, 0
    storage = value.untyped_storage()._cdata
    for name, tensor in tensors.items():
        if tensor.untyped_storage()._cdata == storage:
            offset = (value.storage_offset() - tensor.storage_offset()) * value.itemsize
            if not isinstance(offset, int):
                raise TemplateError(f"an argument points into {name} at an offset that varies: {offset}")
            return name, offset
    raise TemplateError("an argument is a tensor that is none of the kernel's inputs and outputs, nor a view of one")


def _types(traced: Traced) -> dict[str, str]:
    """Element types by tensor: ``bf16``."""
    facts = request_of(traced.launch, 80).arguments
    return {name: facts[argument].type.removeprefix("*") for argument, (name, _) in traced.tensors.items()}


def _role(name: str, outputs: Tensors, written: frozenset[str]) -> Role:
    if name.startswith("_"):
        return "counter" if name.startswith("_zero") else "workspace"
    if name in outputs:
        return "output"
    return "in_place" if name in written else "input"


def _launches_at(question: _Question, sizes: Mapping[str, int]) -> tuple[tuple[Launch, ...], Tensors, Case]:
    case = question.at(sizes)
    tensors = question.kernel.inputs(case, device="meta")
    tensors |= question.kernel.outputs(case, question.config, device="meta")
    return question.kernel.launches(case, question.config, tensors), tensors, case


def _check(question: _Question, piece: Piece | None, sizes: Mapping[str, int]) -> None:
    """Holds a piece against the kernel's own launches at one size."""
    launches, tensors, _ = _launches_at(question, sizes)
    values = question.values(sizes)
    if piece is None or len(piece.launches) != len(launches):
        raise TemplateError(f"{question}: no formula holds at {dict(sizes)}, not even one made there")
    found: dict[str, object] = {}
    wanted: dict[str, object] = {}
    for tensor in piece.tensors:
        found[f"shape of {tensor.name}"] = tensor.sizes(values)
        real = tensors.get(tensor.name)
        wanted[f"shape of {tensor.name}"] = None if real is None else tuple(real.shape)
    for number, (traced, launch) in enumerate(zip(piece.launches, launches, strict=True)):
        found |= {f"{number}: {key}": value for key, value in _said(traced, values).items()}
        wanted |= {f"{number}: {key}": value for key, value in _done(launch, tensors).items()}
    for key in wanted.keys() | found.keys():
        if not _same(found.get(key), wanted.get(key)):
            raise TemplateError(
                f"{question}: at {dict(sizes)} the formulas give {key} = {found.get(key)}, but the kernel launches {wanted.get(key)}"
            )


def _said(traced: Traced, values: Values) -> dict[str, object]:
    """What the formulas say of a launch."""
    said: dict[str, object] = {"grid": tuple(expression(side)(values) for side in traced.grid)}
    said |= {name: expression(text)(values) for name, text in traced.values.items()}
    said |= dict(traced.tensors)
    return said | _fixed(traced.launch)


def _done(launch: Launch, tensors: Tensors) -> dict[str, object]:
    """The same of a launch at one size."""
    done: dict[str, object] = {"grid": launch.grid}
    for name, value in launch.arguments.items():
        done[name] = _place(value, tensors) if isinstance(value, Tensor) else value
    return done | _fixed(launch)


def _fixed(launch: Launch) -> dict[str, object]:
    """What must not vary at all; of integers, how wide they are."""
    whole = {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
    return {
        "function": launch.function,
        "constants": dict(launch.constants),
        "options": launch.options,
        "dependent": launch.dependent,
        "wide integers": tuple(name for name, value in whole.items() if not -(2**31) <= value < 2**31),
    }


def _same(found: object, wanted: object) -> bool:
    if isinstance(found, float) and isinstance(wanted, float):
        return isclose(found, wanted, rel_tol=_NEAR)
    return found == wanted


def _launch(traced: Traced, compiled: Compiled) -> KernelLaunch:
    if compiled.num_ctas != 1 or compiled.profile_scratch_bytes:
        raise TemplateError(f"{compiled.name} asks for clusters or for a profiler's memory, which no template gives")
    given = {parameter.name for parameter in compiled.parameters}
    ones = {
        name: 1 for name in traced.launch.arguments if name not in given
    }  # Triton's own constants: integers that are 1
    return KernelLaunch(
        symbol=compiled.name,
        cubin=hash_of(compiled.cubin),
        arguments=tuple(_argument(traced, parameter.name, parameter.type) for parameter in compiled.parameters),
        grid=traced.grid,
        num_warps=compiled.num_warps,
        shared_bytes=compiled.shared_bytes,
        scratch_bytes=compiled.global_scratch_bytes,
        scratch_align=compiled.global_scratch_align,
        dependent=traced.launch.dependent,
        constants=dict(traced.launch.constants) | ones,
    )


def _argument(traced: Traced, name: str, kind: str) -> KernelArgument:
    if name in traced.values:
        return KernelArgument(name=name, type=kind, value=traced.values[name])
    tensor, offset = traced.tensors[name]
    return KernelArgument(name=name, type=kind, tensor=tensor, offset=offset)
