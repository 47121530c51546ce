"""A sound nano bundle, built once; each test that writes gets a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.gemma3_compile.validate.faults import build_nano


@pytest.fixture(scope="session")
def sound_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano in fp32, every stage. Do not write to it."""
    return build_nano(tmp_path_factory.mktemp("sound") / "nano")


@pytest.fixture(scope="session")
def int4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano in int4 with int8 activations, text only. Do not write to it."""
    return build_nano(tmp_path_factory.mktemp("int4") / "nano", stages="text", dtype="int4", activations="int8")


@pytest.fixture
def sound_copy(sound_bundle: Path, tmp_path: Path) -> Path:
    """A copy of ``sound_bundle`` to write to."""
    return Path(shutil.copytree(sound_bundle, tmp_path / "copy"))
