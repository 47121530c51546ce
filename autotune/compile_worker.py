"""The process that compiles: reads requests from stdin, writes what came of them to stdout, ends with its parent.

It is a process of its own because Triton decides between compiling and interpreting when a kernel's module is
imported, because MLIR ends the process where it meets its own faults, and because several can work at once.
Only :mod:`autotune.ahead_of_time` starts it, as ``python -m autotune.compile_worker``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import IO, Any, cast

from autotune.messages import receive, send


@dataclass(frozen=True, kw_only=True)
class ArgumentFacts:
    """What compilation needs to know of one run-time argument.

    Args:
        type: as Triton writes it: ``*bf16``, ``i32``, ``fp32``.
        specialised: a pointer or an integer, of which Triton assumes what it can.
        one: an integer that is 1.
        aligned: a pointer or an integer that is a multiple of 16.
        varies: an integer whose value may change between launches of one cubin.
    """

    type: str
    specialised: bool = False
    one: bool = False
    aligned: bool = False
    varies: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One function to compile for one architecture."""

    module: str
    function: str
    arguments: Mapping[str, ArgumentFacts]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    architecture: int


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What an error said: in a line, and with its traceback."""

    summary: str
    details: str

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """Triton wraps an error with the source around it; what is wrong stands in the last line of the innermost."""
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        last = (str(root).strip().splitlines() or [""])[-1]
        return cls(summary=f"{type(root).__name__}: {last}", details="".join(traceback.format_exception(error)))


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the compiler gave; ``arguments`` are the pairs of name and type that the cubin takes, in order."""

    cubin: bytes
    name: str
    arguments: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    metadata: Mapping[str, Any]
    registers: int
    spill_bytes: int


def compile_request(request: Request) -> Reply:
    """Compiles, with the specialisation that Triton's own launcher would choose."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = getattr(import_module(request.module), request.function)
    source = GluonASTSource if function.is_gluon() else ASTSource
    signature, constants, attributes = specialised(function.params, request)
    compiled = triton.compile(
        source(fn=function, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", request.architecture, 32),
        options=dict(request.options),
    )
    cubin = compiled.asm["cubin"]
    registers, stack_bytes = resources(cubin)
    fields = (
        "shared", "num_warps", "num_ctas", "global_scratch_size", "global_scratch_align",
        "profile_scratch_size", "profile_scratch_align",
    )  # fmt: skip
    return Reply(
        cubin=cubin,
        name=compiled.metadata.name,
        arguments=tuple((name, kind) for name, kind in signature.items() if kind != "constexpr"),
        aligned=tuple(function.arg_names[position] for (position,), assumed in attributes.items() if assumed),
        metadata={field: getattr(compiled.metadata, field) or 0 for field in fields},
        registers=registers,
        spill_bytes=stack_bytes,
    )


def specialised(
    parameters: list[Any], request: Request
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types of all parameters in order, values of the constants, and what may be assumed of the others.

    The same as Triton's launcher finds, so that it finds the cubin in its cache.

    Raises:
        ValueError: a parameter that the launch does not give and that has no default.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(parameters):
        name = parameter.name
        facts = request.arguments.get(name)
        if facts is None:
            if name not in request.constants and not parameter.has_default:
                raise ValueError(f"the launch gives nothing for the parameter `{name}` of {request.function}")
            signature[name] = "constexpr"
            constants[(position,)] = request.constants.get(name, parameter.default)
            continue
        free = facts.varies or parameter.do_not_specialize
        if facts.one and not free and not parameter.annotation_type:
            signature[name] = "constexpr"
            constants[(position,)] = 1
            continue
        signature[name] = parameter.annotation_type or facts.type
        if facts.specialised and not facts.one and not free:
            # An empty list where nothing is assumed is what Triton's launcher has: it is part of its cache's key.
            aligned = facts.aligned and not parameter.do_not_specialize_on_alignment
            attributes[(position,)] = [["tt.divisibility", 16]] if aligned else []
    return signature, constants, attributes


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of each thread. Triton's programs use a stack for nothing but spilt registers."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump printed no registers: {text[:200]!r}")
    return int(found[1]), int(found[2])


def serve(requests: IO[bytes], replies: IO[bytes], answer: Callable[[Request], Reply] = compile_request) -> None:
    """Answers until ``requests`` ends. A request that fails is answered too."""
    while (message := receive(requests)) is not None:
        try:
            reply: Reply | Refusal = answer(cast(Request, message))
        except Exception as error:  # noqa: BLE001 - whatever Triton raises, the parent has to know
            reply = Refusal.of(error)
        send(replies, reply)


def main() -> None:
    """Serves on this process's own pipes; what Triton prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    # Pickle must find the classes under the module's real name, not under `__main__`.
    import_module("autotune.compile_worker").main()
