"""``gemma3c build``."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3_compile.cli.bars import Bars
from gemma3_compile.cli.choices import NearChoice
from gemma3_compile.presets import PRESETS
from runtimes.bundle_writer import check_destination
from runtimes.errors import UsageError
from runtimes.units import in_words

if TYPE_CHECKING:
    from gemma3_compile.formats import Dtype
    from gemma3_compile.pipeline import BuildPlan, Rounding
    from graphs.onnx_lowering.context import Activations

_PLANNED = "this version of gemma3c builds for ort; the target {} is planned and not there yet"
TARGET = NearChoice(["ort"], planned={name: _PLANNED.format(name) for name in ("trt", "trt-rtx", "cuda")})
DTYPE = NearChoice(
    ["auto", "float32", "int8", "int4"],
    planned={
        "bfloat16": "ONNX Runtime has no bfloat16 on a CPU, so --dtype bfloat16 waits for the target cuda",
        "float16": "float16 overflows in Gemma 3's residual stream, so it is refused",
    },
)


@click.command("build", short_help="Compile a checkpoint into a bundle.")
@click.option("--target", type=TARGET, default="ort", show_default=True, help="What the bundle is for.")
@click.option("--size", type=NearChoice(PRESETS), help="The model's size; read from the checkpoint if left out.")
@click.option(
    "--checkpoint",
    metavar="PATH|HF_ID",
    help="A folder of safetensors, a .gguf file, or a Hugging Face id. Default: Google's own for --size.",
)
@click.option(
    "--random-weights", type=click.IntRange(0), metavar="SEED", help="Invent the weights, for trying things out."
)
@click.option(
    "--dtype",
    type=DTYPE,
    default="auto",
    show_default=True,
    help="Of weights. auto keeps a quantised checkpoint's grid.",
)
@click.option(
    "--activations",
    type=click.Choice(["int8", "int16"]),
    help="What quantised layers round their inputs to: int8 is faster. [default: int8 for int4, else int16]",
)
@click.option("--out", type=click.Path(path_type=Path), help="The folder to make. [default: bundles/SIZE-TARGET-DTYPE]")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is at --out, once the new one is whole.")
@click.option("--context", type=click.IntRange(1), help="Tokens that --dry-run counts the caches for.")
@click.option(
    "--rounding",
    type=click.Choice(["calibrated", "nearest"]),
    help="How int4 is rounded: calibrated takes minutes and halves what is lost. [default: calibrated]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A text file to round int4 by. Default: a text of our own.",
)
@click.option("--revision", help="Branch, tag or commit of a Hugging Face checkpoint.")
@click.option("--token", envvar="HF_TOKEN", show_envvar=True, help="For gated Hugging Face checkpoints.")
@click.option("--offline", is_flag=True, help="Take Hugging Face checkpoints from the local cache only.")
@click.option("--dry-run", is_flag=True, help="Print the planned bytes and stop.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON.")
def command(
    target: str,
    size: str | None,
    checkpoint: str | None,
    random_weights: int | None,
    dtype: Dtype,
    activations: Activations | None,
    out: Path | None,
    overwrite: bool,
    context: int | None,
    rounding: Rounding | None,
    calibration: Path | None,
    revision: str | None,
    token: str | None,
    offline: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compile a checkpoint into a bundle that runs without torch. Prints the bundle's path.

    \b
    gemma3c build --size 4b                                     Google's checkpoint, from Hugging Face
    gemma3c build --checkpoint model.gguf --out bundles/mine    a GGUF file, on its own grid
    gemma3c build --size 270m --random-weights 0                no checkpoint at all
    """
    if size is None and checkpoint is None:
        raise UsageError("nothing says what to build", hint="give --size, --checkpoint, or both")
    if checkpoint is not None and random_weights is not None:
        raise UsageError("--checkpoint and --random-weights exclude each other", hint="leave one of them out")
    if as_json and not dry_run:
        raise UsageError("--json is for --dry-run only", hint="add --dry-run, or leave --json out")
    out = out or default_out(target, size, checkpoint, dtype)
    if not dry_run:
        check_destination(out.absolute(), overwrite=overwrite)

    # Only from here on torch is needed.
    from gemma3_compile.pipeline import BuildRequest, build, plan

    request = BuildRequest(
        target=target,
        size=size,
        checkpoint=checkpoint,
        random_seed=random_weights,
        dtype=dtype,
        activations=activations,
        out=out,
        overwrite=overwrite,
        context=context,
        rounding=rounding,
        calibration=calibration,
        token=token or None,
        offline=offline,
        revision=revision,
    )
    if dry_run:
        show_plan(plan(request), as_json=as_json)
        return
    click.echo(build(request, Bars()))


def default_out(target: str, size: str | None, checkpoint: str | None, dtype: str) -> Path:
    """``bundles/NAME-TARGET-DTYPE``, where NAME is the size or the checkpoint's last part."""
    name = size or re.sub(r"\.(gguf|safetensors)$", "", Path(checkpoint or "model").name)
    return Path("bundles") / f"{name}-{target}-{dtype}"


def show_plan(plan: BuildPlan, *, as_json: bool) -> None:
    """Prints what a build would take."""
    if as_json:
        click.echo(json.dumps(asdict(plan), indent=2))
        return
    for label, value in (
        ("model", f"{plan.size}, from {plan.source}"),
        ("weights", in_words(plan.weights_bytes)),
        (f"caches at {plan.context} tokens", in_words(plan.cache_bytes)),
        ("peak memory of the build", in_words(plan.peak_bytes)),
    ):
        click.echo(f"{label:<28}{value}")
    for note in plan.notes:
        click.echo(f"note: {note}")
