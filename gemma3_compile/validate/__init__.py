"""Holding a bundle against the eager model: how far its numbers lie apart, where they part first, and why."""

from __future__ import annotations

from gemma3_compile.validate.report import Finding, Report, Row
from gemma3_compile.validate.request import ValidateRequest
from gemma3_compile.validate.run import validate

__all__ = ["Finding", "Report", "Row", "ValidateRequest", "validate"]
