"""``gemma3c chat``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_compile.cli.bars import Bars
from gemma3_compile.cli.choices import decode_text
from gemma3_compile.cli.generation_options import GenerationSettings, generation_options, stats_line
from gemma3_compile.cli.reports import report
from gemma3_compile.cli.run_command import show
from runtimes.errors import Gemma3CompileError, UsageError

if TYPE_CHECKING:
    from runtimes.conversation import Conversation
    from runtimes.engine import Engine

_HELP = "/image FILE shows a picture with your next turn, /reset begins anew, /stats tells of speed, /quit ends"


@click.command("chat", short_help="Talk to a bundle, turn by turn.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="Instructions before the first turn.")
@generation_options
def command(bundle: Path, system: str | None, settings: GenerationSettings) -> None:
    """Talk to BUNDLE. What was said stays in the caches, so a turn costs its own tokens only.

    A line is a turn. In a chat: /image FILE, /reset, /stats, /help, /quit. Ctrl-C stops an answer.
    """
    settings.options()
    with settings.load(bundle) as engine:
        Repl(engine, settings, system).run()


class Repl:
    """One chat at a terminal, or over a pipe, where the first error ends it."""

    def __init__(self, engine: Engine, settings: GenerationSettings, system: str | None) -> None:
        self.engine, self.settings, self.system = engine, settings, system
        self.options = settings.options()
        self.interactive = sys.stdin.isatty()
        self.images: list[Path] = []
        self.last_stats: str | None = None
        self.conversation: Conversation = engine.conversation(system=system)

    def run(self) -> None:
        """Takes turns until /quit or the end of the input."""
        if self.interactive:
            click.echo(f"{self.engine.session.manifest.model.name} is ready; {_HELP}", err=True)
        for line in self._lines():
            try:
                if not self._take(line):
                    return
            except Gemma3CompileError as error:
                if not self.interactive:
                    raise
                report(error.message, error.hint)

    def _take(self, line: str) -> bool:
        """Does what a line asks for; False ends the chat."""
        if not line.startswith("/"):
            if line:
                self._answer(line)
            return True
        word, *arguments = _split(line)
        match word, arguments:
            case "/quit" | "/exit", []:
                return False
            case "/image", [path]:
                if self.engine.session.manifest.model.image is None:
                    raise UsageError("this bundle is for text only, so it sees no pictures")
                if not Path(path).is_file():
                    raise UsageError(f"there is no picture {path}")
                self.images.append(Path(path))
                click.echo(f"{len(self.images)} to be shown with your next turn", err=True)
            case "/reset", []:
                self.images.clear()
                self.conversation = self.engine.conversation(system=self.system)
                click.echo("a new chat", err=True)
            case "/stats", []:
                click.echo(self.last_stats or "nothing was written yet", err=True)
            case "/help", []:
                click.echo(_HELP, err=True)
            case _:
                raise UsageError(f"{line!r} is no command of a chat", hint=_HELP)
        return True

    def _answer(self, text: str) -> None:
        stream = self.conversation.stream(
            text,
            images=tuple(self.images),
            pan_and_scan=self.settings.pan_and_scan,
            progress=Bars(),
            max_tokens=self.options.max_tokens,
            sampling=self.options.sampling,
            stop=self.options.stop,
        )
        self.images.clear()
        try:
            show(stream)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            stream.close()
            click.echo("(stopped)", err=True)
        else:
            self.last_stats = stats_line(stream.result())

    def _lines(self) -> Iterator[str]:
        if not self.interactive:
            for number, line in enumerate(sys.stdin.buffer, start=1):
                yield decode_text(line, where=f"line {number} of stdin").strip()
            return
        with suppress(ImportError):
            import_module("readline")  # gives `input` its history and editing
        while True:
            try:
                yield input("> ").strip()
            except EOFError:
                click.echo()
                return


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line!r} cannot be read: {error}", hint="close the quotation marks") from error
