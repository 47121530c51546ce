"""Bundles of nano, one of each kind, built once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # torch is imported by the fixtures that need it: the command line's tests start without it
    from runtimes.bundle import Bundle


@pytest.fixture(scope="module")
def fast_export() -> Iterator[None]:
    """See :func:`tests.gemma3_compile.builds.exported_once`."""
    from tests.gemma3_compile.builds import exported_once

    with exported_once():
        yield


@pytest.fixture(scope="session")
def builds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bundles and the GGUF behind one of them lie."""
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def bundles(builds_folder: Path) -> Mapping[str, Bundle]:
    """One bundle of each of ``builds.KINDS``. Do not write to them."""
    from gemma3_compile.pipeline import build
    from runtimes.bundle import Bundle
    from tests.gemma3_compile.builds import KINDS, exported_once, nano_gguf, request

    special: dict[str, dict[str, object]] = {
        "kept": {"dtype": "auto", "checkpoint": nano_gguf(builds_folder), "random_seed": None},
        "int4 exact": {"dtype": "int4", "activations": "int16"},
        "empty": {"empty_weights": True},
    }
    with exported_once():
        made = {kind: build(request(builds_folder / kind, **special.get(kind, {"dtype": kind}))) for kind in KINDS}
    return {kind: Bundle.open(path) for kind, path in made.items()}
