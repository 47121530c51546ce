"""What a validation feeds: the cases of our own, the user's prompt and pictures.

Legend: N pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma3_compile.validate.cases import (
    Case,
    Passage,
    fitting,
    ids_of,
    image_cases,
    noise_pictures,
    prompt_case,
    text_cases,
    window_of,
)
from gemma3_compile.validate.request import ValidateRequest
from runtimes import chat
from runtimes.bundle import Bundle
from runtimes.chat import Prompt
from runtimes.errors import UsageError
from runtimes.images import load_image, preprocess
from runtimes.manifest import ModelFacts
from runtimes.tokenizer import Tokenizer

ALONE_STEPS = 4
"""Tokens that go one at a time where each layer is looked at alone."""
_PICTURES = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Cases and pictures.

    Args:
        pixels: fp32 [N, 3, size, size], what the cases' ``image_ids`` count; None for a bundle of text.
        cases: run as the runtime runs them.
        alone: for each decoder stage, passages over which each layer is looked at alone.
        said: what was fed, for the receipt.
        notes: what these inputs cannot show.
    """

    pixels: NDArray[np.float32] | None
    cases: tuple[Case, ...]
    alone: Mapping[str, tuple[Passage, ...]]
    said: Mapping[str, int | str]
    notes: tuple[str, ...]


def read_inputs(request: ValidateRequest, bundle: Bundle) -> Inputs:
    """The cases for ``bundle``.

    Raises:
        UsageError: a picture for a bundle of text, or a prompt for a bundle without a tokenizer.
        ImageError: a picture cannot be read.
    """
    manifest = bundle.manifest
    facts, tokens = manifest.model, manifest.tokenizer
    with_images = "decoder_image" if "decoder_image" in manifest.stages else "decoder"
    has_vision = "vision" in manifest.stages and (with_images == "decoder_image" or manifest.target == "trt")
    if request.images and not has_vision:
        raise UsageError(f"a picture was given, but the bundle {bundle.root} is text-only", hint="leave --image out")
    tokenizer = None if tokens is None else Tokenizer.from_file(bundle.path(tokens.file), facts.tokens)
    ids = ids_of(facts, tokenizer)
    settings = manifest.settings
    context = min(facts.max_context, int(settings.get("max_context", facts.max_context)))
    cases = list(text_cases(facts, ids, request.tokens, int(settings.get("window_slack", 0)), context))
    alone: dict[str, tuple[Passage, ...]] = {"decoder": (cases[0].passages[0].with_steps(ALONE_STEPS),)}
    pixels: NDArray[np.float32] | None = None
    pictured: tuple[Case, ...] = ()
    fit: tuple[Case, ...] = ()
    if has_vision:
        pixels = _pixels(request, facts)
        pictured = image_cases(facts, ids)
        chunk = int(settings.get("prefill_chunk", context)) if manifest.target == "trt" else context
        fit = fitting(pictured, context, chunk)
        cases += fit
        alone[with_images] = (*alone.get(with_images, ()), *(passage for case in fit for passage in case.passages))
    if request.prompt is not None:
        prompt = _prompt(request, facts, tokenizer)
        cases.append(prompt_case(prompt, request.tokens, 0 if pixels is None else len(pixels)))
        if prompt.pixels is not None and pixels is not None:
            pixels = np.concatenate([pixels, prompt.pixels])
    longest = max(len(passage) for case in cases for passage in case.passages)
    notes = [] if longest > window_of(facts) else [f"no text is longer than the window of {window_of(facts)} tokens"]
    if len(fit) < len(pictured):
        notes.append("context or chunk of the bundle are too short for some of the cases with pictures")
    said: dict[str, int | str] = {
        "text": "of our own" if tokenizer is not None else "seeded token ids",
        "tokens": sum(len(passage) for case in cases for passage in case.passages),
        "longest": longest,
        "pictures": 0 if pixels is None else len(pixels),
    }
    if request.prompt is not None:
        said["prompt_tokens"] = len(cases[-1].passages[0])  # the text itself may be private
    return Inputs(pixels=pixels, cases=tuple(cases), alone=alone, said=said, notes=tuple(notes))


def _pixels(request: ValidateRequest, facts: ModelFacts) -> NDArray[np.float32]:
    """Two pictures at least: the user's, over and over, or noise."""
    assert facts.image is not None
    if not request.images:
        return noise_pictures(facts, _PICTURES)
    pictures = [preprocess(load_image(path), facts.image) for path in request.images]
    return np.stack([pictures[i % len(pictures)] for i in range(max(_PICTURES, len(pictures)))])


def _prompt(request: ValidateRequest, facts: ModelFacts, tokenizer: Tokenizer | None) -> Prompt:
    """The user's text as it stands; with pictures, a turn of the chat."""
    assert request.prompt is not None
    if tokenizer is None:
        raise UsageError("a prompt was given, but the bundle has no tokenizer", hint="leave --prompt out")
    if request.images:
        return chat.render([chat.user_message(request.prompt, request.images)], tokenizer, facts)
    token_ids = np.array(tokenizer.encode(request.prompt, bos=True), dtype=np.int64)
    return Prompt(token_ids=token_ids, image_ids=np.full(len(token_ids), -1, dtype=np.int64), pixels=None)
