"""The command line is a contract: a change of an option must be made here too.

After a change on purpose, ``python -m tests.gemma3_compile.cli.test_frozen_options`` writes the file anew, and
the change shows in the diff; say it in CHANGELOG.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gemma3_compile.cli.group import COMMANDS, gemma3c

FROZEN = Path(__file__).with_name("options.json")


def options() -> dict[str, Any]:
    """Every command's parameters, without their help texts."""
    context = click.Context(gemma3c)
    commands = {name: gemma3c.get_command(context, name) for name in COMMANDS}
    return {
        name: [describe(parameter) for parameter in command.params]
        for name, command in {"gemma3c": gemma3c, **commands}.items()
        if command is not None
    }


def describe(parameter: click.Parameter) -> dict[str, Any]:
    info = parameter.to_info_dict()
    return {
        "names": [*info["opts"], *info["secondary_opts"]],
        "type": info["type"].get("choices", info["type"]["name"]),
        "default": parameter.default if isinstance(parameter.default, str | int | float | bool) else None,
        "required": info["required"],
        "multiple": info["multiple"],
        "envvar": info["envvar"],
    }


def as_text() -> str:
    return json.dumps(options(), indent=1, default=list) + "\n"


def test_options_are_those_that_were_frozen() -> None:
    assert json.loads(as_text()) == json.loads(FROZEN.read_text())


if __name__ == "__main__":
    FROZEN.write_text(as_text())
