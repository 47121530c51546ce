"""What a validation found: rows, causes, and the receipt that goes into the bundle."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma3_compile.numerics import Divergence
from gemma3_compile.validate.tolerances import Limits

RECEIPT = "receipt.json"
RECEIPT_VERSION = 1
_HEADINGS = ("stage", "case", "against", "rows", "max err", "rel err", "KL mean", "KL max", "top-1", "flip", "")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    ``rows`` counts what was compared: rows of logits, of features, layers or tensors. ``max_error`` is None where
    things of different scale were compared. ``beyond`` says what is beyond ``limits``.
    """

    stage: str
    case: str
    against: str
    rows: int
    max_error: float | None
    relative_error: float
    limits: Limits
    divergence: Divergence | None = None
    beyond: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything is within the limits."""
        return not self.beyond

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        found = self.divergence
        logits = ("–",) * 4
        if found is not None:
            flip = f"{found.flip_margin_max:.2g}" if found.top1 < 1 else "–"
            logits = (f"{found.kl_mean:.1e}", f"{found.kl_max:.1e}", f"{found.top1:.1%}", flip)
        verdict = "ok" if self.passed else "; ".join(self.beyond)
        errors = "–" if self.max_error is None else f"{self.max_error:.1e}", f"{self.relative_error:.1e}"
        return (self.stage, self.case, self.against, str(self.rows), *errors, *logits, verdict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where numbers part, and why.

    Args:
        stage, place: ``decoder``, ``layer 5 (global)``.
        cause: a short name (``rope scale``); ``unknown`` where no hypothesis fits and the look says nothing.
        sentence: what it means.
        evidence: what was measured.
    """

    stage: str
    place: str
    cause: str
    sentence: str
    evidence: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """As the command prints it."""
        yield f"{self.stage}, {self.place}: {self.cause}: {self.sentence}"
        for line in self.evidence:
            yield f"    {line}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a validation found.

    Args:
        bundle: its name and the hashes of what was run.
        references: what the bundle was held against.
        inputs: what was fed.
        versions: of the packages that took part.
        notes: what limits what this says.
        interpreted: whether the bundle's networks were interpreted, and its plans not run.
    """

    bundle: Mapping[str, Any]
    references: tuple[str, ...]
    inputs: Mapping[str, Any]
    versions: Mapping[str, str]
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())
    created: str | None = None
    interpreted: bool = False

    @property
    def passed(self) -> bool:
        """Whether every row is within its limits."""
        return all(row.passed for row in self.rows)

    def lines(self) -> Iterator[str]:
        """The table, the causes and the conclusion."""
        table = [_HEADINGS, *(row.cells() for row in self.rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(_HEADINGS) - 1)]
        for cells in table:
            columns = [
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells[:-1], widths, strict=True))
            ]
            yield f"{'  '.join(columns)}  {cells[-1]}".rstrip()
        yield ""
        for finding in self.findings:
            yield from finding.lines()
        for note in self.notes:
            yield f"note: {note}"
        yield self.conclusion()

    def conclusion(self) -> str:
        """The last line."""
        bad = sum(not row.passed for row in self.rows)
        how = " (interpreted: the plan itself was not run)" if self.interpreted else ""
        if not bad:
            return f"sound: all {len(self.rows)} comparisons are within tolerance{how}"
        causes = ", ".join(dict.fromkeys(finding.cause for finding in self.findings)) or "no cause found"
        return f"not sound: {bad} of {len(self.rows)} comparisons are beyond tolerance ({causes}){how}"

    def to_json(self) -> dict[str, Any]:
        """The receipt: plain JSON, infinite errors as the string ``inf``."""
        data = {"receipt_version": RECEIPT_VERSION, "passed": self.passed, "conclusion": self.conclusion()}
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        rest = {**vars(self), "rows": rows, "findings": [asdict(finding) for finding in self.findings]}
        plain: dict[str, Any] = _finite({**data, **rest})
        return plain

    def receipt(self) -> bytes:
        """The bytes of ``receipt.json``."""
        return (json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
