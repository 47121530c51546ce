"""Validation, as one readable function: the bundle beside the eager model, stage by stage.

    weights      the bundle's, read back, against the checkpoint's (where there is one)
    vision       features of pictures
    decoder      logits of whole passages, as the runtime runs them
    layers       each layer alone, over the bundle's own residual stream; what drifts is explained
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gemma3_compile.validate import diagnosis, weights_check
from gemma3_compile.validate.calls import Embedding
from gemma3_compile.validate.cases import Case, Passage, image_cases, window_of
from gemma3_compile.validate.end_to_end import compare_cases, hidden_states, max_error
from gemma3_compile.validate.inputs import Inputs, read_inputs
from gemma3_compile.validate.layers_alone import Place, check_layers, probed_strip
from gemma3_compile.validate.probes import ProbedBundle
from gemma3_compile.validate.reference import config_of, open_reference, require_same_model
from gemma3_compile.validate.report import RECEIPT, Finding, Report, Row
from gemma3_compile.validate.tolerances import feature_limits, logit_limits
from gemma3_compile.validate.vision_alone import check_vision
from gemma3_compile.validate.vision_calls import features_of
from gemma3_compile.validate.weights import BundleWeights, CheckpointWeights, Weights
from runtimes.bundle import Bundle
from runtimes.bundle_writer import replace_file, source_date
from runtimes.errors import BundleError
from runtimes.progress import SILENT, Progress
from runtimes.session import Provider, Session, open_session
from runtimes.version import __version__

Reference = Literal["auto", "bundle"]
_ALONE_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class ValidateRequest:
    """What is to be validated, against what, on which inputs.

    Args:
        checkpoint, size, random_seed, token, offline, revision: as a build takes them.
        reference: ``bundle`` holds the bundle against its own weights only, whatever it was built from.
        prompt: a text to run besides the cases of our own.
        images: pictures for the vision stage, and for the prompt.
        tokens: the most tokens of a text.
        write_receipt: whether what was found goes into the bundle.
    """

    bundle: Path
    checkpoint: str | Path | None = None
    size: str | None = None
    random_seed: int | None = None
    reference: Reference = "auto"
    prompt: str | None = None
    images: tuple[Path, ...] = ()
    tokens: int | None = None
    provider: Provider = "auto"
    threads: int | None = None
    token: str | None = None
    offline: bool = False
    revision: str | None = None
    write_receipt: bool = True


def validate(request: ValidateRequest, progress: Progress = SILENT) -> Report:
    """Compares a bundle with the eager model, and writes the receipt into it.

    Raises:
        UsageError, CheckpointError, BundleError, HostError, ImageError: as the message says. Numbers beyond
            tolerance are no error: see :attr:`Report.passed`.
    """
    bundle = Bundle.open(request.bundle)
    with ExitStack() as stack:
        session = stack.enter_context(
            open_session(bundle, provider=request.provider, threads=request.threads)
        )
        checkpoint = open_reference(request, bundle.manifest, progress)
        if checkpoint is not None:
            stack.enter_context(checkpoint)
        config = config_of(bundle.manifest, request.size) if checkpoint is None else checkpoint.config
        require_same_model(config, bundle.manifest)
        inputs = read_inputs(request, bundle)
        work = _Work(bundle=bundle, session=session, inputs=inputs, progress=progress)
        with torch.inference_mode():
            own = BundleWeights(bundle, config)
            rows, findings = work.compare(own, None if checkpoint is None else CheckpointWeights(checkpoint))
            places = work.alone(own, request)
    rows += diagnosis.place_rows(places, own.label)
    findings += diagnosis.findings_of(places, window_of(bundle.manifest.model))
    if not findings:
        activations = bundle.manifest.settings.get("activations")
        findings = diagnosis.beyond_the_layers(rows, own.label, None if activations is None else str(activations))
    source = None if checkpoint is None else checkpoint.source
    report = _report(bundle, source, inputs, rows, findings)
    if request.write_receipt:
        _write_receipt(bundle, report, progress)
    return report


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A bundle that is loaded, and what it is fed."""

    bundle: Bundle
    session: Session
    inputs: Inputs
    progress: Progress

    def compare(self, own: BundleWeights, checkpoint: CheckpointWeights | None) -> tuple[list[Row], list[Finding]]:
        """Whole passages against the bundle's own weights, and against the checkpoint's where they differ."""
        if checkpoint is None:
            return self._against(own, exact=True), []
        rows, findings = weights_check.check_weights(own, checkpoint, self.progress)
        if weights_check.identical(rows):
            own.label = checkpoint.label  # one and the same: each comparison is made once
            return rows + self._against(own, exact=True), findings
        return rows + self._against(own, exact=True) + self._against(checkpoint, exact=False), findings

    def _against(self, weights: Weights, *, exact: bool) -> list[Row]:
        """Rows of the vision stage and of every case. ``exact``: the weights are those that the bundle computes with."""
        manifest, inputs = self.bundle.manifest, self.inputs
        rows, features_MH = [], None
        if inputs.pixels is not None:
            expected_NTX = features_of(weights, torch.from_numpy(inputs.pixels)).numpy()
            features_MH = expected_NTX.reshape(-1, expected_NTX.shape[-1])
            actual_MH = self.session.encode_images(inputs.pixels)
            rows.append(_feature_row(features_MH, actual_MH, len(inputs.pixels), weights.label, manifest, exact=exact))
        embedding = Embedding(weights)
        features = None if features_MH is None else torch.from_numpy(features_MH)
        hidden = hidden_states(weights, embedding, inputs.cases, features, self.progress)
        return rows + compare_cases(
            self.session,
            embedding,
            inputs.cases,
            features_MH,
            hidden,
            against=weights.label,
            limits=logit_limits(manifest, exact=exact),
            progress=self.progress,
        )
