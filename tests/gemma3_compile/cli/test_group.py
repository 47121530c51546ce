"""The group: help without heavy imports, guesses, and how errors end."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import click
import pytest

from gemma3_compile.cli import reports
from gemma3_compile.cli.group import COMMANDS
from gemma3_compile.cli.group import gemma3c as group
from runtimes.errors import BundleError, Gemma3CompileError, UsageError
from runtimes.version import __version__
from tests.gemma3_compile.cli.conftest import Gemma3c

HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "PIL", "sentencepiece", "tqdm", "gguf", "huggingface_hub"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["build", "--help"], ["run", "--help"], ["nonsense"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from gemma3_compile.cli import run; run(sys.argv[1:]);"
        f"print('heavy:', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_lists_every_command_with_its_own_short_help(gemma3c: Gemma3c) -> None:
    result = gemma3c("--help")
    assert result.code == 0
    for name, line in COMMANDS.items():
        assert line in result.out
        command = import_module(f"gemma3_compile.cli.{name}_command").command
        assert (command.name, command.get_short_help_str(limit=100)) == (name, line)
        assert isinstance(group.get_command(click.Context(group), name), click.Command)


def test_version(gemma3c: Gemma3c) -> None:
    assert gemma3c("--version").out == f"gemma3c {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bild"], "there is no command 'bild'; did you mean 'build'?"),
        (["zzz"], "there is no command 'zzz'"),
        (["verify"], "Missing argument 'BUNDLE'"),
        (["verify", "a", "b"], "unexpected extra argument"),
        (["build", "--targt", "ort"], "--targt"),
        (["build", "--target", "ortx"], "but got 'ortx'; did you mean 'ort'?"),
        (
            ["build", "--size", "12bb"],
            "expected one of nano, 270m, 1b, 4b, 12b, 27b, but got '12bb'; did you mean '12b'?",
        ),
        (["build", "--size", "nano", "--random-weights", "x"], "--random-weights"),
        (["run", "x", "y", "--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_wrong_usage_is_two_lines_and_exit_2(gemma3c: Gemma3c, arguments: list[str], message: str) -> None:
    result = gemma3c(*arguments)
    assert result.code == 2
    assert result.out == ""
    error, hint = result.err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: gemma3c ")


def test_the_group_alone_shows_its_help(gemma3c: Gemma3c) -> None:
    result = gemma3c()
    assert result.code == 2
    assert "doctor" in result.out + result.err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BundleError("it broke", hint="mend it"), 1, "error: it broke\nhint: mend it\n"),
        (Gemma3CompileError("it broke."), 1, "error: it broke\n"),
        (UsageError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            "error: this command needs the package torch, which is not installed here\nhint: pip install 'gemma3-compile[build]'\n",
        ),
        (
            ModuleNotFoundError("No module named 'onnxruntime.capi'", name="onnxruntime.capi"),
            1,
            "error: this command needs the package onnxruntime, which is not installed here\nhint: pip install 'gemma3-compile[ort]'\n",
        ),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
        (MemoryError(), 1, "error: this host's memory does not suffice\nhint: "),
        (ZeroDivisionError("by zero"), 1, "error: unexpected ZeroDivisionError: by zero\nhint: this is a fault"),
    ],
)
def test_each_error_ends_without_a_traceback(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    assert reports.exit_code_of(error) == code
    assert capsys.readouterr().err.startswith(text)


@pytest.mark.parametrize("command", [("tune", "--size", "4b"), ("profile", "--gpu", "h100")])
def test_a_missing_package_is_told_with_the_extra_of_the_command(
    command: tuple[str, ...], gemma3c: Gemma3c, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra build brings torch too, but would not do."""
    monkeypatch.setattr(reports, "find_spec", lambda package: None if package == "torch" else object())
    result = gemma3c(*command)
    assert result.code == 1
    assert result.err == (
        "error: this command needs the package torch, which is not installed here\n"
        "hint: pip install 'gemma3-compile[tune]'\n"
    )


def test_debug_shows_the_traceback(gemma3c: Gemma3c, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gemma3c("verify", "/no/such/folder").code == 1
    with pytest.raises(BundleError):
        gemma3c("--debug", "verify", "/no/such/folder")
    monkeypatch.setenv("GEMMA3C_DEBUG", "1")
    with pytest.raises(BundleError):
        gemma3c("verify", "/no/such/folder")
