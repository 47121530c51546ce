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
    from gemma3_compile.formats import Dtype, TrtDtype
    from gemma3_compile.pipeline import BuildPlan, Rounding
    from graphs.onnx_lowering.context import Activations, WeightSource
    from runtimes.trt.binding import Flavour

TARGET = NearChoice(
    ["ort", "trt"],
    planned={
        "trt-rtx": "TensorRT for RTX is a flavour of the target trt: --target trt --flavour rtx",
        "cuda": "this version of gemma3c builds for ort and trt; the target cuda is planned and not there yet",
    },
)
_FLOAT16 = "float16 overflows in Gemma 3's residual stream, so it is refused"
DTYPE = NearChoice(["auto", "float32", "bfloat16", "int8", "int4", "fp8"], planned={"float16": _FLOAT16})
_FOREIGN_DTYPES = {
    ("ort", "bfloat16"): "ONNX Runtime has no bfloat16 on a CPU, so --dtype bfloat16 is for --target trt",
    ("ort", "fp8"): "ONNX Runtime has no fp8 products, so --dtype fp8 is for --target trt",
    ("trt", "float32"): "plans compute in bfloat16, so --dtype float32 is for --target ort",
}


def read_architectures(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    """``sm_90`` as the number 90; raises BadParameter for what is none."""
    found = [re.fullmatch(r"sm_(\d{2,3})", value.lower()) for value in values]
    for value, match in zip(values, found, strict=True):
        if match is None:
            raise click.BadParameter(f"expected an architecture such as sm_80, but got {value!r}", ctx, param)
    return tuple(int(match[1]) for match in found if match is not None)


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
    help="Of weights. auto keeps a quantised checkpoint's grid for ort, and is bfloat16 for trt.",
)
@click.option(
    "--activations",
    type=click.Choice(["int8", "int16"]),
    help="ort: what quantised layers round their inputs to: int8 is faster. [default: int8 for int4, else int16]",
)
@click.option("--out", type=click.Path(path_type=Path), help="The folder to make. [default: bundles/SIZE-TARGET-DTYPE]")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is at --out, once the new one is whole.")
@click.option(
    "--context",
    type=click.IntRange(1),
    help="trt: the most tokens of a text, at most the model's own. ort: what --dry-run counts the caches for. "
    "[default: 8192 for trt]",
)
@click.option(
    "--flavour",
    type=click.Choice(["rtx", "full"]),
    help="trt: TensorRT for RTX or full TensorRT. [default: what is installed and serves --arch]",
)
@click.option(
    "--arch",
    "architectures",
    metavar="SM_NN",
    multiple=True,
    callback=read_architectures,
    help="trt: a GPU architecture; may be repeated. [default: this host's, or all that the flavour serves]",
)
@click.option(
    "--weights",
    type=click.Choice(["input", "constant"]),
    help="trt: whether plans get weights from the weights file or hold a copy. [default: input; constant for int4, where it fits]",
)
@click.option("--chunk", type=click.IntRange(2), help="trt: the most tokens of a prompt at a time. [default: 2048]")
@click.option("--batch", type=click.IntRange(1), help="trt: the most sequences at a time. [default: 1]")
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
    dtype: Dtype | TrtDtype,
    activations: Activations | None,
    out: Path | None,
    overwrite: bool,
    context: int | None,
    flavour: Flavour | None,
    architectures: tuple[int, ...],
    weights: WeightSource | None,
    chunk: int | None,
    batch: int | None,
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
    gemma3c build --target trt --size 12b --arch sm_89          TensorRT plans; no GPU is needed for that
    """
    if size is None and checkpoint is None:
        raise UsageError("nothing says what to build", hint="give --size, --checkpoint, or both")
    if checkpoint is not None and random_weights is not None:
        raise UsageError("--checkpoint and --random-weights exclude each other", hint="leave one of them out")
    if as_json and not dry_run:
        raise UsageError("--json is for --dry-run only", hint="add --dry-run, or leave --json out")
    if (target, dtype) in _FOREIGN_DTYPES:
        raise UsageError(_FOREIGN_DTYPES[target, dtype], hint="leave out --dtype, or choose the other --target")
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
        flavour=flavour,
        architectures=architectures,
        weights=weights,
        chunk=chunk,
        batch=batch,
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
        ("target", plan.target),
        ("model", f"{plan.size}, from {plan.source}"),
        ("weights", in_words(plan.weights_bytes)),
        (f"caches at {plan.context} tokens", in_words(plan.cache_bytes)),
        ("peak memory of the build", in_words(plan.peak_bytes)),
    ):
        click.echo(f"{label:<28}{value}")
    for decision in plan.decisions:
        click.echo(f"{decision.name:<28}{decision.choice}: {decision.reason}")
    for note in plan.notes:
        click.echo(f"note: {note}")
