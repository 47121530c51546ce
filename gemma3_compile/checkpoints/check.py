"""A checkpoint against the model it claims to be, and into the eager model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from gemma3_compile.checkpoints.base import Checkpoint
from gemma3_compile.config import ModelConfig
from gemma3_compile.model import Gemma3
from runtimes.errors import CheckpointError

_LISTED = 10
"""Names listed of each kind of fault; the rest is counted."""


def expected_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Canonical name to shape of every tensor of the model, in the order of the eager model's parameters."""
    return {name: tuple(parameter.shape) for name, parameter in _empty_model(config).named_parameters()}


def _empty_model(config: ModelConfig) -> Gemma3:
    """The eager model without memory behind its parameters."""
    with torch.device("meta"):
        return Gemma3(config)


def _listing(title: str, lines: Iterable[str]) -> list[str]:
    """``title (count): first ten, and the rest as a number``; empty where there are no lines."""
    names = sorted(lines)
    if not names:
        return []
    rest = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"  {title} ({len(names)}): {', '.join(names[:_LISTED])}{rest}"]


def check_tensors(checkpoint: Checkpoint) -> None:
    """Holds names and shapes against the eager model, then runs the format's own checks.

    Reads no weights but a stored copy of the tied head, which must equal the embedding.
    Raises CheckpointError that lists missing, extra and misshapen tensors.
    """
    if checkpoint.config.text.num_layers > len(checkpoint.names()):  # before a model of a million layers is built
        raise CheckpointError(
            f"{checkpoint.source}: {len(checkpoint.names())} tensors were found, too few for "
            f"{checkpoint.config.text.num_layers} layers",
            hint="config.json and weights must come from one model",
        )
    expected = expected_shapes(checkpoint.config)
    found = {name: checkpoint.info(name).shape for name in checkpoint.names()}
    wrong = [
        f"{name} (expected {list(shape)}, got {list(found[name])})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = [
        *_listing("missing", expected.keys() - found.keys()),
        *_listing("extra", found.keys() - expected.keys()),
        *_listing("of another shape", wrong),
    ]
    if faults:
        raise CheckpointError(
            f"{checkpoint.source}: the tensors are not those of its configuration "
            f"({describe(checkpoint.config)}):\n" + "\n".join(faults),
            hint="config.json and weights must come from one model; adapters (LoRA) must be merged into it first",
        )
    checkpoint.check_stored()


def describe(config: ModelConfig) -> str:
    """A model in a few words: ``12b: 48 layers, hidden 3840, with vision``."""
    kind = "with vision" if config.vision is not None else "text-only"
    return f"{config.name}: {config.text.num_layers} layers, hidden {config.text.hidden_size}, {kind}"


def load_eager(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Gemma3:
    """The eager model with the checkpoint's weights in ``dtype``, in eval mode and without gradients.

    Beyond the model itself, one tensor is in memory at a time. Raises CheckpointError as :func:`check_tensors`.
    """
    check_tensors(checkpoint)
    model = _empty_model(checkpoint.config)
    for name, _ in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        weight = nn.Parameter(checkpoint.read(name).to(dtype), requires_grad=False)
        setattr(model.get_submodule(module), leaf, weight)
    return model.eval()
