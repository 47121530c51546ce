"""Validation, as one readable function: the bundle beside the eager model, stage by stage.

weights      the bundle's, read back, against the checkpoint's (where there is one)
vision       features of pictures
decoder      logits of whole passages, as the runtime runs them
layers       each layer alone, over the bundle's own residual stream; what drifts is explained
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata

import torch

from gemma3_compile.validate import diagnosis
from gemma3_compile.validate.cases import window_of
from gemma3_compile.validate.comparison import Comparison
from gemma3_compile.validate.inputs import Inputs, read_inputs
from gemma3_compile.validate.opened import open_for
from gemma3_compile.validate.reference import config_of, open_reference, require_same_model
from gemma3_compile.validate.report import RECEIPT, Finding, Report, Row
from gemma3_compile.validate.request import ValidateRequest
from gemma3_compile.validate.weights import BundleWeights, CheckpointWeights
from runtimes.bundle import Bundle
from runtimes.bundle_writer import replace_file, source_date
from runtimes.errors import BundleError
from runtimes.manifest import Manifest
from runtimes.progress import SILENT, Progress
from runtimes.trt.binding import MODULES
from runtimes.version import __version__


def validate(request: ValidateRequest, progress: Progress = SILENT) -> Report:
    """Compares a bundle with the eager model, and writes the receipt into it.

    Raises:
        BundleError: the bundle is damaged; a file that was changed since it was built is named.
        UsageError, CheckpointError, HostError, ImageError: as the message says.

    Numbers beyond tolerance are no error: see :attr:`Report.passed`.
    """
    bundle = Bundle.open(request.bundle)
    bundle.verify(progress)  # the receipt names the files by their hashes
    with ExitStack() as stack:
        checkpoint = open_reference(request, bundle.manifest, progress)
        if checkpoint is not None:
            stack.enter_context(checkpoint)
        config = config_of(bundle.manifest, request.size) if checkpoint is None else checkpoint.config
        require_same_model(config, bundle.manifest)
        inputs = read_inputs(request, bundle)
        own = BundleWeights(bundle, config)
        original = None if checkpoint is None else CheckpointWeights(checkpoint)
        with torch.inference_mode():
            opened = open_for(request, bundle, progress)
            comparison = Comparison(bundle=bundle, inputs=inputs, progress=progress, run=opened.run)
            with opened.session as session:
                rows, findings = comparison.whole(session, own, original)
            places = comparison.alone(own, opened.probed())
    rows += diagnosis.place_rows(places, own.label)
    findings += diagnosis.findings_of(places, window_of(bundle.manifest.model))
    if not findings:
        activations = bundle.manifest.settings.get("activations")
        findings = diagnosis.beyond_the_layers(
            rows,
            own.label,
            None if activations is None else str(activations),
            short=bundle.manifest.caches.dtype == "bfloat16",
            alone=bool(places),
        )
    source = None if checkpoint is None else checkpoint.source
    notes = (*opened.notes, *inputs.notes, *comparison.notes)
    report = _report(bundle, source, inputs, notes, rows, findings, interpreted=opened.interpreted)
    if request.write_receipt:
        _write_receipt(bundle, report, progress)
    return report


def _report(
    bundle: Bundle,
    source: str | None,
    inputs: Inputs,
    notes: Sequence[str],
    rows: Sequence[Row],
    findings: Sequence[Finding],
    *,
    interpreted: bool,
) -> Report:
    manifest = bundle.manifest
    run = {*(stage.graph for stage in manifest.stages.values()), manifest.weights.file}
    if not interpreted:
        run |= {stage.plan for stage in manifest.stages.values() if stage.plan is not None}
    engine = "onnxruntime" if manifest.target == "ort" else MODULES["full" if _is_full(manifest) else "rtx"]
    packages = ("torch", engine, "numpy")
    return Report(
        bundle={
            "name": bundle.root.resolve().name,
            "model": manifest.model.name,
            "weights": manifest.weights.dtype,
            "sha256": {name: manifest.files[name].sha256 for name in sorted(run)},
        },
        references=("the bundle's own weights", *([] if source is None else [source])),
        inputs=inputs.said,
        versions={"gemma3c": __version__, **{package: _version(package) for package in packages}},
        rows=tuple(rows),
        findings=tuple(findings),
        notes=tuple(notes),
        created=source_date(),
        interpreted=interpreted,
    )


def _is_full(manifest: Manifest) -> bool:
    return manifest.settings.get("flavour") == "full"


def _version(package: str) -> str:
    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _write_receipt(bundle: Bundle, report: Report, progress: Progress) -> None:
    """Puts the receipt into the bundle; a bundle that cannot be written keeps the one it has, with a note."""
    try:
        replace_file(bundle, RECEIPT, report.receipt())
    except BundleError as error:
        progress.note(f"the receipt was not written: {error.message}")
