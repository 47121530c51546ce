"""``gemma3c verify``."""

from __future__ import annotations

from pathlib import Path

import click

from gemma3_compile.cli.bars import Bars
from runtimes.bundle import Bundle
from runtimes.units import in_words


@click.command("verify", short_help="Hash a bundle's files again.")
@click.argument("bundle", type=click.Path(path_type=Path))
def command(bundle: Path) -> None:
    """Hash the files of BUNDLE again and compare them with its manifest.

    Exit code 1 names each file that is missing or was changed. The manifest itself carries no hash.
    """
    found = Bundle.open(bundle).verify(Bars())
    for name in found.unlisted:
        click.echo(f"note: {name} is not part of the bundle", err=True)
    click.echo(f"{bundle}: {found.files} files, {in_words(found.bytes)}, all as they were written")
