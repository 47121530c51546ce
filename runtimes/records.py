"""Frozen dataclasses to JSON and back, checked field by field.

A field's type hint is its schema: ``int``, ``float``, ``bool``, ``str``, ``X | None``, ``Literal``,
``tuple[X, ...]``, ``tuple[X, X]``, ``Mapping[str, X]``, a union of scalars, or another dataclass.
Reading is strict: a missing, unknown or mistyped field raises, and the message says where it stands.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from runtimes.errors import BundleError, Gemma3CompileError

T = TypeVar("T")

_SCALAR_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}


def to_json(value: Any) -> Any:
    """A dataclass, or any nesting of them in tuples and mappings, as what ``json.dumps`` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], data: Any, *, where: str) -> T:
    """``data`` as the dataclass ``cls``.

    Args:
        where: how messages name the place, such as ``manifest.json: model``.

    Raises:
        BundleError: a field is missing, unknown, or not what its type says; or ``cls`` refuses the values.
    """
    if not isinstance(data, dict):
        raise BundleError(f"{where}: expected an object, but got {_show(data)}")
    hints = _hints(cls)  # type: ignore[arg-type]  # mypy takes a type variable's class for unhashable
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise BundleError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BundleError(f"{where}: the field {name!r} is missing")
    try:
        return cls(**values)
    except Gemma3CompileError as error:
        raise BundleError(f"{where}: {error.message}", hint=error.hint) from error


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if type(value) not in {type(arg) for arg in args} or value not in args:
            raise BundleError(f"{where}: expected one of {', '.join(map(repr, args))}, but got {_show(value)}")
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, where)
    if origin is tuple:
        return _decode_tuple(args, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, but got {_show(value)}")
        return {key: _decode(args[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where=where)
    if not _is_scalar(hint, value):
        raise BundleError(f"{where}: expected {_SCALAR_NAMES[hint]}, but got {_show(value)}")
    return float(value) if hint is float else value


def _decode_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    """A union of scalars, or one structured type and null."""
    for arg in args:
        if arg in _SCALAR_NAMES and arg is not float and _is_scalar(arg, value):
            return value
    if float in args and _is_scalar(float, value):
        return float(value)
    structured = [arg for arg in args if arg not in _SCALAR_NAMES]
    if structured:
        return _decode(structured[0], value, where)
    expected = " or ".join(_SCALAR_NAMES[arg] for arg in args)
    raise BundleError(f"{where}: expected {expected}, but got {_show(value)}")


def _decode_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise BundleError(f"{where}: expected a list, but got {_show(value)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise BundleError(f"{where}: expected a list of {len(args)}, but got {len(value)} items")
    return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _is_scalar(hint: Any, value: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
