"""``gemma3c doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from gemma3_compile import doctor
from gemma3_compile.cli.choices import NearChoice
from runtimes.bundle import Bundle

_COLOURS = {"works": "green", "missing": "yellow", "planned": "blue"}
_NEEDS = NearChoice(["build", "ort", "ort-cuda", "trt", "trt-rtx", "cuda"])


@click.command("doctor", short_help="Say which targets work on this host, and what is missing.")
@click.option(
    "--need",
    "needs",
    type=_NEEDS,
    multiple=True,
    help="Exit with 1 unless this works; may be given many times. [default: ort]",
)
@click.option("--bundle", type=click.Path(path_type=Path), help="Also say whether this bundle runs here.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.pass_context
def command(ctx: click.Context, needs: tuple[str, ...], bundle: Path | None, as_json: bool) -> None:
    """Say which targets work on this host, and what is missing for the others.

    Exit code 0 if everything that --need names works, and the bundle of --bundle, else 1.
    """
    found = doctor.examine(None if bundle is None else Bundle.open(bundle))
    if bundle is not None:
        needs = (*needs, "bundle")
    lacking = [need for need in needs or ("ort",) if found.state(need) != "works"]
    if as_json:
        click.echo(json.dumps({**asdict(found), "lacking": lacking}, indent=2))
    else:
        show(found)
    ctx.exit(1 if lacking else 0)


def show(found: doctor.Examination) -> None:
    """Prints an examination for people."""
    for label, value in found.host.items():
        click.echo(f"{label:<10}{value}")
    click.echo()
    for finding in found.findings:
        state = click.style(f"{finding.state:<8}", fg=_COLOURS[finding.state])
        tail = f" ({finding.found})" if finding.found else ""
        click.echo(f"{finding.name:<10}{state}  {finding.purpose}{tail}")
        if finding.state == "planned":
            click.echo(f"{'':<20}this version of gemma3c does not build for it yet")
        for missing in finding.missing:
            click.echo(f"{'':<20}{missing}")
