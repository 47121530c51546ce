"""``gemma3c inspect``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from runtimes.bundle import Bundle
from runtimes.errors import BundleError
from runtimes.manifest import LayerFacts, Manifest
from runtimes.ort_caches import window_slack
from runtimes.units import in_words


@click.command("inspect", short_help="Print what a bundle says of itself.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest (with --tensors: the ledger) as JSON.")
@click.option("--tensors", is_flag=True, help="Print for each stored tensor what was done to it.")
def command(bundle: Path, as_json: bool, tensors: bool) -> None:
    """Print BUNDLE's manifest, readable or as JSON."""
    opened = Bundle.open(bundle)
    if tensors:
        ledger = read_ledger(opened)
        lines = [json.dumps(ledger, indent=2)] if as_json else tensor_lines(ledger)
    else:
        lines = [opened.manifest.dumps().decode().rstrip()] if as_json else manifest_lines(opened.manifest)
    for line in lines:
        click.echo(line)


def manifest_lines(manifest: Manifest) -> Iterator[str]:
    """The manifest for people, one fact a line."""
    model = manifest.model
    versions = ", ".join(f"{name} {version}" for name, version in manifest.producer.items() if name != "checkpoint")
    yield _row(
        "model", f"{model.name}: {len(model.layers)} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}"
    )
    yield _row("target", manifest.target)
    yield _row("made by", versions + (f" at {manifest.created}" if manifest.created else ""))
    if "checkpoint" in manifest.producer:
        yield _row("made from", manifest.producer["checkpoint"])
    yield _row("layers", "; ".join(_layers(model.layers)))
    yield _row("context", f"up to {model.max_context} tokens")
    for context in sorted({min(4096, model.max_context), min(32768, model.max_context), model.max_context}):
        yield _row(f"  caches at {context}", f"{in_words(cache_bytes(manifest, context))} in {manifest.caches.dtype}")
    if model.image is None:
        yield _row("pictures", "no: this bundle is for text only")
    else:
        crops = "on" if model.image.pan_and_scan.enabled else "off"
        yield _row(
            "pictures",
            f"{model.image.size}x{model.image.size}, {model.image.tokens_per_image} tokens each, Pan & Scan {crops}",
        )
    yield _row("weights", f"{manifest.weights.dtype}, in {manifest.weights.file}")
    tokenizer = manifest.tokenizer
    yield _row("tokenizer", f"{tokenizer.kind}, template {tokenizer.template}" if tokenizer else "none: token ids only")
    for name, stage in manifest.stages.items():
        yield _row(f"stage {name}", f"{stage.graph}: inputs {len(stage.inputs)}, outputs {len(stage.outputs)}")
    for name, value in manifest.settings.items():
        yield _row(f"setting {name}", str(value))
    if manifest.gpu_architectures:
        yield _row("GPUs", ", ".join(manifest.gpu_architectures))
    yield _row("validated", f"yes, see {manifest.receipt}" if manifest.receipt else "not yet: gemma3c validate BUNDLE")
    total = sum(facts.bytes for facts in manifest.files.values())
    yield _row("files", f"{len(manifest.files)}, {in_words(total)}")
    for name, facts in sorted(manifest.files.items()):
        yield _row(f"  {name}", f"{in_words(facts.bytes):>9}  sha256 {facts.sha256[:16]}…")


def cache_bytes(manifest: Manifest, context: int) -> int:
    """What keys and values of one sequence take on a CPU when the context is ``context`` tokens."""
    element_bytes = 4 if manifest.caches.dtype == "float32" else 2
    slack = window_slack(manifest, "cpu")
    return sum(
        2 * layer.kv_heads * layer.head_dim * (layer.window + slack if layer.window else context) * element_bytes
        for layer in manifest.model.layers
    )


def read_ledger(bundle: Bundle) -> list[dict[str, Any]]:
    """The bundle's ledger of tensors; raises BundleError where it is none."""
    name = bundle.manifest.weights.ledger
    try:
        ledger = json.loads(bundle.path(name).read_bytes())
    except ValueError as error:
        raise BundleError(f"{name} is not JSON: {error}", hint="build the bundle again") from error
    if not isinstance(ledger, list) or not all(isinstance(tensor, dict) and "name" in tensor for tensor in ledger):
        raise BundleError(f"{name} is not a list of tensors with names", hint="build the bundle again")
    return ledger


def tensor_lines(ledger: list[dict[str, Any]]) -> Iterator[str]:
    """One line a tensor: name, type, shape, and the steps that led to it."""
    width = max((len(tensor["name"]) for tensor in ledger), default=0)
    for tensor in ledger:
        shape = "x".join(map(str, tensor.get("shape", [])))
        steps = "; ".join(map(str, tensor.get("steps", []))) or "as it was"
        yield f"{tensor['name']:<{width}}  {tensor.get('dtype', '?'):<8}  {shape:<16}  {steps}"


def _layers(layers: tuple[LayerFacts, ...]) -> Iterator[str]:
    for facts, count in Counter(layers).items():
        window = f"window {facts.window}" if facts.window else "whole context"
        yield f"{count} {facts.kind} ({window}, {facts.kv_heads} kv heads of {facts.head_dim})"


def _row(label: str, value: str) -> str:
    return f"{label:<27} {value}" if len(label) <= 27 else f"{label}  {value}"
