"""What a bundle is held against: the checkpoint it was built from, if it can be had, and the model's configuration."""

from __future__ import annotations

import re
from dataclasses import replace

from gemma3_compile.checkpoints import Checkpoint, check_tensors, open_checkpoint
from gemma3_compile.config import ModelConfig
from gemma3_compile.facts import model_facts
from gemma3_compile.presets import PRESETS, preset
from gemma3_compile.validate.request import ValidateRequest
from runtimes.errors import CheckpointError, Gemma3CompileError, UsageError
from runtimes.manifest import Manifest
from runtimes.progress import Progress

_RANDOM = re.compile(r"random weights, size (\S+), seed (\d+)")
_HUB = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{7,40})")


def open_reference(request: ValidateRequest, manifest: Manifest, progress: Progress) -> Checkpoint | None:
    """The checkpoint that was named; else the one that the bundle names, if it is at hand; None for neither.

    Raises:
        CheckpointError, UsageError, ConfigError: one was named that cannot be opened.
    """
    if request.reference == "bundle":
        return None
    if request.checkpoint is not None or request.random_seed is not None:
        size = request.size
        if request.random_seed is not None and size is None and manifest.model.name in PRESETS:
            size = manifest.model.name
        checkpoint = open_checkpoint(
            request.checkpoint,
            size=size,
            random_seed=request.random_seed,
            token=request.token,
            offline=request.offline,
            revision=request.revision,
        )
        return _checked(checkpoint)
    source = manifest.producer.get("checkpoint", "")
    found = _reopened(source)
    if found is None:
        progress.note(
            f"the bundle was built from {source or 'an unnamed checkpoint'}, which is not at hand: its numbers are held "
            "against the eager model with the bundle's own weights; --checkpoint adds what rounding them cost"
        )
    return found


def _reopened(source: str) -> Checkpoint | None:
    """The checkpoint that a manifest names, where the name says enough; never over the network."""
    try:
        if made := _RANDOM.fullmatch(source):
            return _checked(open_checkpoint(None, size=made[1], random_seed=int(made[2])))
        if hub := _HUB.fullmatch(source):
            return _checked(open_checkpoint(hub[1], size=None, offline=True, revision=hub[2]))
    except Gemma3CompileError:
        return None
    return None


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    try:
        check_tensors(checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def config_of(manifest: Manifest, size: str | None) -> ModelConfig:
    """The eager model's configuration without a checkpoint: the preset that the bundle, or the caller, names.

    Raises:
        UsageError: neither names a preset.
    """
    facts = manifest.model
    if size is None and facts.name not in PRESETS:
        raise UsageError(
            f"the bundle holds a model named {facts.name!r}, which is no preset, so its configuration is not known here",
            hint=f"give --checkpoint, or --size with one of {', '.join(PRESETS)}",
        )
    found = preset(size or facts.name)
    text = replace(found.text, vocab_size=facts.vocab_size, max_context=facts.max_context)
    return replace(found, text=text, vision=found.vision if "vision" in manifest.stages else None)


def require_same_model(config: ModelConfig, manifest: Manifest) -> None:
    """Raises CheckpointError where the manifest describes another model than ``config``."""
    ours, theirs = model_facts(config, None), manifest.model
    for field in ("vocab_size", "hidden_size", "layers"):
        if getattr(ours, field) != getattr(theirs, field):
            what = "its layers differ" if field == "layers" else f"{getattr(theirs, field)} and {getattr(ours, field)}"
            raise CheckpointError(
                f"the bundle holds {theirs.name!r}, which is not the model it is to be held against, "
                f"{config.name!r}: `{field}`: {what}",
                hint="name the checkpoint or the size that the bundle was built from",
            )
    if "vision" in manifest.stages and config.vision is None:
        raise CheckpointError(
            "the bundle has a vision stage, but what it is to be held against is text-only",
            hint="name the checkpoint that the bundle was built from",
        )
