"""The comparisons of one validation: a loaded bundle, what it is fed, and the eager model beside it.

Legend: N pictures, T tokens a picture, M = N T rows of image features, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from gemma3_compile.validate import weights_check
from gemma3_compile.validate.calls import Embedding
from gemma3_compile.validate.end_to_end import EagerRun, RunLimits, compare_cases, max_error
from gemma3_compile.validate.inputs import Inputs
from gemma3_compile.validate.layers_alone import Place, check_layers, probed_strip
from gemma3_compile.validate.probes import Probed
from gemma3_compile.validate.report import Finding, Row
from gemma3_compile.validate.tolerances import feature_limits, in_bfloat16, logit_limits
from gemma3_compile.validate.vision_alone import STAGE as VISION
from gemma3_compile.validate.vision_alone import check_vision
from gemma3_compile.validate.vision_calls import features_of
from gemma3_compile.validate.weights import BundleWeights, CheckpointWeights, InBfloat16, Weights
from runtimes.bundle import Bundle
from runtimes.progress import Progress
from runtimes.session import Session


@dataclass(kw_only=True)
class Comparison:
    """See the module. ``run`` is how much the session takes at once; ``notes`` gathers what could not be compared."""

    bundle: Bundle
    inputs: Inputs
    progress: Progress
    run: RunLimits = field(default_factory=RunLimits)
    notes: list[str] = field(default_factory=list)
    _features: dict[Weights, NDArray[np.float32] | None] = field(default_factory=dict)

    def whole(
        self, session: Session, own: BundleWeights, checkpoint: CheckpointWeights | None
    ) -> tuple[list[Row], list[Finding]]:
        """Whole passages against the bundle's own weights, and against the checkpoint's where they differ."""
        if checkpoint is None:
            return self._against(session, own, exact=True), []
        rows, findings = weights_check.check_weights(own, checkpoint, self.progress)
        if weights_check.identical(rows):
            own.label = checkpoint.label  # one and the same: each comparison is made once
            return rows + self._against(session, own, exact=True), findings
        return rows + self._against(session, own, exact=True) + self._against(
            session, checkpoint, exact=False
        ), findings

    def _against(self, session: Session, weights: Weights, *, exact: bool) -> list[Row]:
        """Rows of the vision stage and of every case. ``exact``: these are the weights that the bundle computes with.

        A bundle in bf16 is held against fp32 too; the eager model in bf16 says how far from it a sound one lies.
        """
        manifest, features_MH = self.bundle.manifest, self._features_of(weights)
        short = InBfloat16(weights) if self._is_short else None
        rows = []
        if features_MH is not None and self.inputs.pixels is not None:
            actual_MH = session.encode_images(self.inputs.pixels)
            error, largest = max_error(features_MH, actual_MH), float(np.abs(features_MH).max())
            limits = feature_limits(manifest, exact=exact)
            if short is not None:
                own = features_of(short, torch.from_numpy(self.inputs.pixels)).flatten(0, 1).float().numpy()
                limits = in_bfloat16(limits, max_error(features_MH, own) / largest)
            rows.append(
                Row(
                    stage=VISION,
                    case=f"{len(self.inputs.pixels)} pictures",
                    against=weights.label,
                    rows=len(actual_MH),
                    max_error=error,
                    relative_error=error / largest,
                    limits=limits,
                    beyond=limits.beyond(error / largest, None),
                )
            )
        features, cases = None if features_MH is None else torch.from_numpy(features_MH), self.inputs.cases

        def eager(of: Weights) -> EagerRun:
            return EagerRun.of(of, cases, features, self.progress, scale_dtype=self._scale_dtype)

        return rows + compare_cases(
            session,
            eager(weights),
            cases,
            features_MH,
            against=weights.label,
            limits=logit_limits(manifest, exact=exact),
            short=None if short is None else eager(short),
            run=self.run,
            progress=self.progress,
        )

    @property
    def _is_short(self) -> bool:
        """Whether the bundle computes in bf16."""
        return self.bundle.manifest.caches.dtype == "bfloat16"

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._is_short else torch.float32

    def alone(self, own: BundleWeights, probed: Probed) -> list[Place]:
        """Each layer of each stage alone, and what explains those that drift."""
        if not probed.in_fp32 or not probed.probes("decoder"):
            self.notes.append("layers were not looked at alone: the bundle has no probes in fp32")
            return []
        places: list[Place] = []
        if self.inputs.pixels is not None:
            places += check_vision(own, probed, self.inputs.pixels, self.progress)
        embedding, features_MH = Embedding(own, self._scale_dtype), self._features_of(own)
        strips = [
            probed_strip(probed, embedding, passage, stage, features_MH)
            for stage, passages in self.inputs.alone.items()
            for passage in passages
        ]
        return places + check_layers(own, embedding, strips, self.progress)

    def _features_of(self, weights: Weights) -> NDArray[np.float32] | None:
        """Rows of image features [M, H] by the eager tower; both sides of the decoder get the same."""
        if weights not in self._features:
            features_MH = None
            if self.inputs.pixels is not None:
                features_MH = features_of(weights, torch.from_numpy(self.inputs.pixels)).flatten(0, 1).numpy()
            self._features[weights] = features_MH
        return self._features[weights]
