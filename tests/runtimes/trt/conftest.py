"""nano as a bundle for TensorRT for RTX, built once: plans for one architecture, chunks of 32, two sequences, 96 slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # what builds imports torch
    from graphs.trt.interpreter import InterpretedBundle
    from runtimes.bundle import Bundle


@pytest.fixture(scope="session")
def trt_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from gemma3_compile.pipeline import build
    from runtimes.bundle import Bundle
    from tests.gemma3_compile.builds import trt_request

    return Bundle.open(build(trt_request(tmp_path_factory.mktemp("bundle") / "nano", architectures=(80,))))


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """nano without a vision tower: its decoder takes no pictures."""
    from gemma3_compile.pipeline import build
    from runtimes.bundle import Bundle
    from tests.gemma3_compile.builds import nano_gguf, trt_request

    folder = tmp_path_factory.mktemp("text")
    request = trt_request(
        folder / "nano", architectures=(80,), checkpoint=nano_gguf(folder), random_seed=None, dtype="bfloat16"
    )
    return Bundle.open(build(request))


@pytest.fixture(scope="session")
def networks(trt_bundle: Bundle) -> Iterator[InterpretedBundle]:
    """Its networks, as TensorRT's parser reads them."""
    from graphs.trt.interpreter import InterpretedBundle
    from runtimes.trt import load

    yield InterpretedBundle.open(load("rtx"), trt_bundle)
