"""``gemma3c validate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_compile.cli.bars import Bars
from gemma3_compile.cli.choices import NearChoice, decode_text
from gemma3_compile.cli.generation_options import PROVIDER
from gemma3_compile.presets import PRESETS
from runtimes.errors import UsageError

if TYPE_CHECKING:
    from gemma3_compile.validate.request import Reference
    from runtimes.session import Provider

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("validate", short_help="Compare a bundle's numbers with the eager model's.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint", metavar="PATH|HF_ID", help="What the bundle was built from. [default: what it names, if at hand]"
)
@click.option("--size", type=NearChoice(PRESETS), help="The model's size, where the bundle does not name one.")
@click.option(
    "--random-weights", type=click.IntRange(0), metavar="SEED", help="The seed that the bundle was built from."
)
@click.option(
    "--reference",
    type=NearChoice(["auto", "bundle"]),
    default="auto",
    show_default=True,
    help="bundle: the eager model gets the bundle's own weights, whatever it was built from.",
)
@click.option("--prompt", help="A text to run too, beside the cases of our own.")
@click.option("--prompt-file", type=_FILE, help="The same, from a file.")
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; many times.")
@click.option("--tokens", type=click.IntRange(2), help="The most tokens of a text. [default: past the window]")
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
    size: str | None,
    random_weights: int | None,
    reference: Reference,
    prompt: str | None,
    prompt_file: Path | None,
    images: tuple[Path, ...],
    tokens: int | None,
    provider: Provider,
    threads: int | None,
    revision: str | None,
    token: str | None,
    offline: bool,
    receipt: bool,
    as_json: bool,
) -> None:
    """Compare each stage of BUNDLE with the eager model, find the first layer that drifts, and say why.

    Exit code 1 beyond tolerance. Needs the extra build. A bundle for TensorRT that cannot be run here, or with --provider
    cpu, is interpreted: torch computes the networks that its plans were built from, and the report says so.

    \b
    gemma3c validate bundles/270m                             against its own weights: is the graph right?
    gemma3c validate bundles/270m --checkpoint model.gguf     and what did rounding the weights cost?
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file exclude each other", hint="leave one of them out")
    if prompt_file is not None:
        prompt = decode_text(prompt_file.read_bytes(), where=str(prompt_file))

    from gemma3_compile.validate import ValidateRequest, validate

    request = ValidateRequest(
        bundle=bundle,
        checkpoint=checkpoint,
        size=size,
        random_seed=random_weights,
        reference=reference,
        prompt=prompt,
        images=images,
        tokens=tokens,
        provider=provider,
        threads=threads,
        revision=revision,
        token=token or None,
        offline=offline,
        write_receipt=receipt,
    )
    found = validate(request, Bars())
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        for line in found.lines():
            click.echo(line)
    ctx.exit(0 if found.passed else 1)
