"""Triton's interpreter with the repairs that the kernels' own tests make to it."""

from __future__ import annotations

from tests.autotune import conftest as _repairs  # noqa: F401 - importing it repairs
