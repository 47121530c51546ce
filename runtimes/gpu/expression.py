"""The little language in which a kernel file says what depends on the sizes of a call: ``(S + 63) // 64``.

Whole numbers and decimals, names, ``+ - * // %``, ``min(a, b)``, ``max(a, b)`` and ``cdiv(a, b)``; a condition is two
of these around one of ``< <= == != >= >``. The text is parsed by Python's own parser and walked: nothing is evaluated
that is not in this list, so that a file from elsewhere can do no more than arithmetic.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from runtimes.errors import BundleError

Number = int | float
Values = Mapping[str, Number]
_Node = Callable[[Values], Number]

_LONGEST = 500
"""Characters; the parser is recursive."""
_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
}
_FUNCTIONS: Mapping[str, Callable[[Any, Any], Any]] = {"min": min, "max": max, "cdiv": lambda a, b: -(-a // b)}


class Expression:
    """A parsed expression; equal to another one of the same text.

    >>> Expression("cdiv(S, 64) * B")({"S": 100, "B": 3})
    6
    """

    def __init__(self, text: str) -> None:
        """Raises BundleError where the text is not of the language; the message says what."""
        self.text = text
        names: set[str] = set()
        self._value = _compiled(_parsed(text), text, names)
        self.names = frozenset(names)

    def __call__(self, values: Values) -> Number:
        """The value where each name has that of ``values``.

        Raises:
            BundleError: a name has none, or something is divided by zero.
        """
        try:
            return self._value(values)
        except KeyError as error:
            raise BundleError(f"`{self.text}` needs a value for {error.args[0]}") from None
        except ZeroDivisionError:
            raise BundleError(f"`{self.text}` divides by zero at {_shown(values)}") from None

    def whole(self, values: Values) -> int:
        """The value, which must be a whole number; raises BundleError otherwise."""
        value = self(values)
        if not isinstance(value, int):
            raise BundleError(f"`{self.text}` must be a whole number, but is {value} at {_shown(values)}")
        return value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


class Condition:
    """A parsed condition, such as ``B * S <= 512``."""

    def __init__(self, text: str) -> None:
        """Raises BundleError where the text is not a comparison of two expressions."""
        self.text = text
        node = _parsed(text)
        if not isinstance(node, ast.Compare) or len(node.ops) != 1 or type(node.ops[0]) not in _COMPARISONS:
            raise BundleError(f"`{text}` is not a condition: two expressions with one comparison between them")
        names: set[str] = set()
        self._compare = _COMPARISONS[type(node.ops[0])]
        self._left, self._right = (_compiled(side, text, names) for side in (node.left, node.comparators[0]))
        self.names = frozenset(names)

    def __call__(self, values: Values) -> bool:
        """Whether it holds; raises BundleError where a name has no value."""
        try:
            return self._compare(self._left(values), self._right(values))
        except KeyError as error:
            raise BundleError(f"`{self.text}` needs a value for {error.args[0]}") from None


@cache
def expression(text: str) -> Expression:
    """As the class; a text is parsed once in a process."""
    return Expression(text)


@cache
def condition(text: str) -> Condition:
    """As the class; a text is parsed once in a process."""
    return Condition(text)


def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise BundleError(f"an expression of {len(text)} characters is longer than {_LONGEST}: `{text[:40]}…`")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BundleError(f"`{text}` is not an expression: {error}") from None


def _compiled(node: ast.expr, text: str, names: set[str]) -> _Node:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return lambda values: number
        case ast.Name(id=name):
            names.add(name)
            return lambda values: values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _compiled(operand, text, names)
            return lambda values: -inner(values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _of_two(_OPERATORS[type(op)], left, right, text, names)
        case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]) if name in _FUNCTIONS:
            return _of_two(_FUNCTIONS[name], left, right, text, names)
    raise BundleError(f"`{text}` has {ast.unparse(node)!r} in it, which is not of the language of expressions")


def _of_two(operation: Callable[[Any, Any], Any], left: ast.expr, right: ast.expr, text: str, names: set[str]) -> _Node:
    a, b = _compiled(left, text, names), _compiled(right, text, names)
    return lambda values: operation(a(values), b(values))


def _shown(values: Values) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
