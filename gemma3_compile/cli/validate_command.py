"""``gemma3c validate``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gemma3_compile.cli.bars import Bars
from gemma3_compile.cli.generation_options import PROVIDER
from runtimes.errors import UsageError


@click.command("validate", short_help="Compare a bundle's numbers with the eager model's.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint", metavar="PATH|HF_ID", help="What the bundle was built from. [default: as the bundle says]"
)
@click.option(
    "--random-weights", type=click.IntRange(0), metavar="SEED", help="The seed that the bundle was built from."
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A text file to read; may be given many times. Default: texts of our own.",
)
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture to look at; many times."
)
@click.option("--max-tokens", type=click.IntRange(1), help="Read no more than this many tokens of a text.")
@click.option("--provider", type=PROVIDER, default="auto", show_default=True, help="Where the bundle runs.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: the physical cores]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face checkpoint.")
@click.option("--token", envvar="HF_TOKEN", show_envvar=True, help="For gated Hugging Face checkpoints.")
@click.option("--offline", is_flag=True, help="Take Hugging Face checkpoints from the local cache only.")
@click.option("--receipt/--no-receipt", default=True, show_default=True, help="Write what was found into the bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    checkpoint: str | None,
    random_weights: int | None,
    texts: tuple[Path, ...],
    images: tuple[Path, ...],
    max_tokens: int | None,
    provider: str,
    threads: int | None,
    revision: str | None,
    token: str | None,
    offline: bool,
    receipt: bool,
    as_json: bool,
) -> None:
    """Compare each stage of BUNDLE with the eager model, and find the first layer that drifts.

    Exit code 1 beyond tolerance. Needs the extra build.
    """
    if checkpoint is not None and random_weights is not None:
        raise UsageError("--checkpoint and --random-weights exclude each other", hint="leave one of them out")

    from gemma3_compile.validate import ValidateRequest, validate

    request = ValidateRequest(
        bundle=bundle,
        checkpoint=checkpoint,
        random_seed=random_weights,
        texts=texts,
        images=images,
        max_tokens=max_tokens,
        provider=provider,
        threads=threads,
        revision=revision,
        token=token or None,
        offline=offline,
        write_receipt=receipt,
    )
    found = validate(request, Bars())
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        for line in found.lines():
            click.echo(line)
    ctx.exit(0 if found.passed else 1)
