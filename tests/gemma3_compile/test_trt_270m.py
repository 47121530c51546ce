"""The real, pre-trained 270M as plans for four architectures: built once, looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma3_compile.pipeline import BuildRequest, build
from runtimes.bundle import Bundle

WINDOW, LAYERS, GLOBAL_LAYERS = 512, 18, 3


@pytest.fixture(scope="module")
def bundle(gguf_270m_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(
        build(
            BuildRequest(
                target="trt",
                out=tmp_path_factory.mktemp("trt") / "270m",
                checkpoint=gguf_270m_path,
                size="270m",
                architectures=(80, 86, 89, 120),
                context=1024,
                chunk=128,
            )
        )
    )


def test_the_plan(bundle: Bundle) -> None:
    bundle.verify()
    report = json.loads(bundle.path("plans.json").read_bytes())["decoder"]
    layers, plugins = report["network"]["layers"], report["network"]["plugins"]
    assert report["architectures"] == ["sm_80", "sm_86", "sm_89", "sm_120"]
    assert layers["PLUGIN_V3"] == len(plugins) == LAYERS - GLOBAL_LAYERS
    assert (layers["ATTENTION_INPUT"], layers["KV_CACHE_UPDATE"]) == (GLOBAL_LAYERS, 2 * GLOBAL_LAYERS)
    assert {plugin["fields"]["window"] for plugin in plugins} == {WINDOW}
    assert {plugin["fields"]["scale"] for plugin in plugins} == {256**-0.5}
    assert all(len(plugin["aliases"]) == 2 for plugin in plugins)
    assert bundle.path("decoder.plan").stat().st_size < 100e6, "the weights, 536 MB, are inputs"
