"""The passes over an exported stage, and the driver that runs them in order."""

from __future__ import annotations

import logging
from collections.abc import Collection

from graphs.passes.base import Pass, PassResult
from graphs.passes.drop_noops import DROP_NOOPS
from graphs.passes.fold_norm_offset import FOLD_NORM_OFFSET
from graphs.passes.fuse_add_norm import FUSE_ADD_NORM
from graphs.passes.merge_linears import MERGE_LINEARS
from graphs.passes.name_layers import NAME_LAYERS
from graphs.passes.select_rows_early import SELECT_ROWS_EARLY
from graphs.program import Program
from runtimes.errors import ExportError, UsageError

logger = logging.getLogger(__name__)

PASSES: tuple[Pass, ...] = (
    DROP_NOOPS,
    NAME_LAYERS,  # after drop_noops, which would erase a marked node; before any rewrite
    FOLD_NORM_OFFSET,  # after drop_noops, as torch.export's assertions would keep the plain weight alive
    SELECT_ROWS_EARLY,  # before the merging passes, whose nodes it does not know
    MERGE_LINEARS,
    FUSE_ADD_NORM,
)


def run_passes(program: Program, *, without: Collection[str] = ()) -> dict[str, PassResult]:
    """Runs every pass but those named in ``without``; returns what each one did.

    Raises:
        UsageError: ``without`` names a pass that does not exist.
        ExportError: a pass failed; the message names it and those that ran before.
    """
    names = [p.name for p in PASSES]
    if unknown := set(without) - set(names):
        raise UsageError(f"unknown pass: {', '.join(sorted(unknown))}", hint=f"the passes are {', '.join(names)}")
    results: dict[str, PassResult] = {}
    for step in PASSES:
        if step.name in without:
            continue
        try:
            results[step.name] = step.run(program)
            program.graph.lint()
        except Exception as error:
            raise ExportError(
                f"pass `{step.name}` failed on stage `{program.stage.name}` after {list(results)}: {error}",
                hint=f"leave it out: compile_for_ort(..., without_passes=['{step.name}'])",
            ) from error
        logger.info("%s: %s changed %d", program.stage.name, step.name, results[step.name].changed)
        for reason in results[step.name].refused:
            logger.info("%s: %s left %s", program.stage.name, step.name, reason)
    program.module.recompile()
    return results
