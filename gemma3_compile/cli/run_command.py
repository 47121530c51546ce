"""``gemma3c run``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_compile.cli.bars import Bars
from gemma3_compile.cli.choices import read_prompt
from gemma3_compile.cli.generation_options import GenerationSettings, generation_options, result_json, stats_line
from runtimes.errors import UsageError

if TYPE_CHECKING:
    from runtimes.results import Stream


@click.command("run", short_help="Write text for one prompt, also about pictures.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; may be given many times."
)
@click.option("--chat/--raw", default=True, show_default=True, help="A user's turn of a chat, or text to go on with.")
@click.option("--system", metavar="TEXT", help="Instructions before the prompt.")
@generation_options
@click.option(
    "--logprobs", type=click.IntRange(0), metavar="N", help="With --json: log probabilities of N tokens a step."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, token ids and figures.")
@click.option("--stats", is_flag=True, help="Print tokens per second and memory to stderr.")
def command(
    bundle: Path,
    prompt: str | None,
    images: tuple[Path, ...],
    chat: bool,
    system: str | None,
    settings: GenerationSettings,
    logprobs: int | None,
    as_json: bool,
    stats: bool,
) -> None:
    """Write on from PROMPT (or stdin, with - or a pipe) with BUNDLE.

    \b
    gemma3c run bundles/270m "Why is the sky blue?"
    gemma3c run bundles/4b "What is in this picture?" --image cat.jpg
    cat notes.txt | gemma3c run bundles/270m --raw --temperature 0
    """
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json, since text has no room for them", hint="add --json")
    if system is not None and not chat:
        raise UsageError("--system is for a chat, so it cannot be used with --raw", hint="leave one of them out")
    options = settings.options(logprobs=logprobs)
    text = read_prompt(prompt)
    with settings.load(bundle) as engine:
        from runtimes.chat import Message, user_message

        request: str | list[Message] = text
        if system is not None:
            request = [{"role": "system", "content": system}, user_message(text, images)]
        stream = engine.stream(
            request,
            images=images if system is None else (),
            pan_and_scan=settings.pan_and_scan,
            raw=not chat,
            progress=Bars(),
            max_tokens=options.max_tokens,
            sampling=options.sampling,
            stop=options.stop,
            logprobs=options.logprobs,
        )
        if not as_json:
            show(stream)
        result = stream.result()
    if as_json:
        click.echo(json.dumps(result_json(result), indent=2, ensure_ascii=False))
    if stats:
        click.echo(stats_line(result), err=True)


def show(stream: Stream) -> None:
    """Prints text as it comes, and ends the line whatever happens."""
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        click.echo()
