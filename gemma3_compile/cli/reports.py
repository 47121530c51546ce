"""How an error ends: one line that says what, one that says what to do, and an exit code."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

import click

from runtimes.errors import Gemma3CompileError, HostError

INTERRUPTED = 130

EXTRA_OF_PACKAGE: Mapping[str, str] = MappingProxyType(
    {
        "gguf": "build",
        "huggingface_hub": "build",
        "ml_dtypes": "build",
        "onnx": "build",
        "onnx_ir": "build",
        "onnxruntime": "ort",
        "optuna": "tune",
        "safetensors": "build",
        "tensorrt": "trt",
        "tensorrt_rtx": "trt-rtx",
        "torch": "build",
        "triton": "tune",
    }
)
"""Which extra of gemma3-compile brings a package that a command may find missing."""


def exit_code_of(error: BaseException) -> int:
    """Prints ``error`` to stderr as its reader needs it, and gives the exit code."""
    match error:
        case Gemma3CompileError():
            report(error.message, error.hint)
            return error.exit_code
        case click.exceptions.Exit():
            return error.exit_code
        case click.Abort() | KeyboardInterrupt():
            click.echo("interrupted", err=True)
            return INTERRUPTED
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else "gemma3c"
            report(error.format_message(), f"{path} --help lists what it takes")
            return error.exit_code
        case click.ClickException():
            report(error.format_message())
            return error.exit_code
        case ModuleNotFoundError() if error.name and error.name.partition(".")[0] in EXTRA_OF_PACKAGE:
            missing = missing_package(error.name.partition(".")[0])
            report(missing.message, missing.hint)
            return missing.exit_code
        case MemoryError():
            report("this host's memory does not suffice", "gemma3c build --dry-run says what a build needs")
            return 1
        case OSError() if error.filename is not None:
            report(f"{error.filename}: {error.strerror}")
            return 1
        case _:
            report(
                f"unexpected {type(error).__name__}: {error}",
                "this is a fault of gemma3c; `gemma3c --debug ...` shows where, please report it",
            )
            return 1


def missing_package(package: str, extra: str | None = None) -> HostError:
    """The error for a package that this command needs and this host lacks; None for the first extra that brings it."""
    return HostError(
        f"this command needs the package {package}, which is not installed here",
        hint=f"pip install 'gemma3-compile[{extra or EXTRA_OF_PACKAGE[package]}]'",
    )


def require(extra: str, *packages: str) -> None:
    """For a command whose extra brings packages that other extras bring too.

    Raises:
        HostError: one of the packages is missing; the hint names ``extra``.
    """
    for package in packages:
        if find_spec(package) is None:
            raise missing_package(package, extra)


def report(message: str, hint: str | None = None) -> None:
    """Prints an error and its hint to stderr; the words are red and cyan on a terminal."""
    click.echo(click.style("error: ", fg="red", bold=True) + message.rstrip("."), err=True)
    if hint is not None:
        click.echo(click.style("hint: ", fg="cyan", bold=True) + hint, err=True)
