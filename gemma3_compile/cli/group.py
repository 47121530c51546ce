"""The group ``gemma3c``: its commands by name, each imported when it is called."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

import click

from runtimes.version import __version__

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "build": "Compile a checkpoint into a bundle.",
        "run": "Write text for one prompt, also about pictures.",
        "chat": "Talk to a bundle, turn by turn.",
        "validate": "Compare a bundle's numbers with the eager model's.",
        "tune": "Find each kernel's fastest configuration on this GPU.",
        "profile": "Hold each kernel's time against the GPU's limit.",
        "inspect": "Print what a bundle says of itself.",
        "verify": "Hash a bundle's files again.",
        "doctor": "Say which targets work on this host, and what is missing.",
    }
)
"""Name and one line of help of each command; ``gemma3_compile/cli/NAME_command.py`` holds it as ``command``."""


@dataclass
class Settings:
    """What holds for every command. ``debug`` asks for tracebacks."""

    debug: bool = False


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"gemma3_compile.cli.{cmd_name}_command").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"there is no command {args[0]!r}{guess}", ctx=ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Data goes to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
)
@click.version_option(__version__, "-V", "--version", prog_name="gemma3c", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, envvar="GEMMA3C_DEBUG", show_envvar=True, help="Show the traceback of an error.")
@click.pass_obj
def gemma3c(settings: Settings, debug: bool) -> None:
    """Compile Gemma 3 checkpoints into bundles, and run them without torch."""
    settings.debug = debug
