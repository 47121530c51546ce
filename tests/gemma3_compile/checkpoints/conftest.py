"""Checkpoint folders, written once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gemma3_compile.model import Gemma3
from tests.gemma3_compile.checkpoints.hf_folders import write_v4, write_v5
from tests.twins import Twin, seeded_model, twin_of


@pytest.fixture(scope="session")
def folders(nano_model: Gemma3, nano_twin: Twin, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """nano as ``v5``, ``v4`` and ``sharded``; its text decoder alone as ``text``. Do not write to them."""
    root = tmp_path_factory.mktemp("folders")
    text = seeded_model(replace(nano_model.config, vision=None))
    return {
        "v5": write_v5(nano_twin, root / "v5"),
        "v4": write_v4(nano_twin, nano_model, root / "v4"),
        "sharded": write_v5(nano_twin, root / "sharded", shard_bytes=100_000),
        "text": write_v5(twin_of(text), root / "text"),
    }
