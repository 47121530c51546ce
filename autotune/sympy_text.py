"""torch's symbolic sizes as text of :mod:`runtimes.gpu.expression`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from runtimes.errors import Gemma3CompileError

_COMPARISONS = {
    sympy.Lt: "<", sympy.Le: "<=", sympy.Eq: "==", sympy.Ne: "!=", sympy.Ge: ">=", sympy.Gt: ">",
}  # fmt: skip


class SymbolError(Gemma3CompileError):
    """A symbolic size has something in it that the language of expressions lacks."""


def text_of(value: Any, names: Mapping[sympy.Symbol, str]) -> str:
    """A number, a SymInt, or a sympy expression or comparison.

    Args:
        names: what each symbol is called.

    Raises:
        SymbolError: there is no word for a part of it; the message says for which.
    """
    node = getattr(value, "node", None)
    if node is not None:
        value = node.expr
    if isinstance(value, int | float):
        return repr(value)
    if type(value) in _COMPARISONS:
        left, right = (text_of(side, names) for side in value.args)
        return f"{left} {_COMPARISONS[type(value)]} {right}"
    return _text(value, names)


def _text(value: Any, names: Mapping[sympy.Symbol, str]) -> str:
    if isinstance(value, sympy.Integer):
        return str(int(value))
    if isinstance(value, sympy.Symbol) and value in names:
        return names[value]
    parts = [_text(part, names) for part in value.args]
    if isinstance(value, sympy.Add):
        # sympy puts the number first; after the rest it reads as one writes it.
        return " + ".join(sorted(parts, key=_is_number))
    if isinstance(value, sympy.Mul):
        return " * ".join(_bracketed(part) for part in parts)
    if isinstance(value, FloorDiv):
        return f"{_bracketed(parts[0])} // {_bracketed(parts[1])}"
    if isinstance(value, Mod | PythonMod):
        return f"{_bracketed(parts[0])} % {_bracketed(parts[1])}"
    if type(value).__name__ in ("Min", "Max") and len(parts) == 2:
        return f"{type(value).__name__.lower()}({parts[0]}, {parts[1]})"
    if isinstance(value, sympy.Pow) and parts[1].isdigit():
        return " * ".join([_bracketed(parts[0])] * int(parts[1]))
    raise SymbolError(f"`{value}` has a {type(value).__name__} in it, which the language of expressions lacks")


def _bracketed(text: str) -> str:
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def _is_number(text: str) -> bool:
    return text.lstrip("-").isdigit()
