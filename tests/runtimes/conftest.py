"""A real bundle of nano, built once for the tests of the runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

NANO_SEED = 1


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano with random weights of ``NANO_SEED`` in fp32, for ``ort``. Do not write to it."""
    from gemma3_compile.pipeline import BuildRequest, build

    out = tmp_path_factory.mktemp("bundles") / "nano"
    return build(BuildRequest(target="ort", size="nano", random_seed=NANO_SEED, dtype="float32", out=out))
