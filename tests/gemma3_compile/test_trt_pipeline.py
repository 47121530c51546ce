"""Whole builds of nano for TensorRT for RTX, without a GPU, and of the real 270M; and builds that fail."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import resources, util
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors import safe_open

from gemma3_compile.cli import run
from gemma3_compile.pipeline import build, plan
from gemma3_compile.targets import trt
from gemma3_compile.targets.trt_host import Host
from graphs.trt import build as plan_build
from graphs.trt import polygraphy_network
from graphs.trt.profiles import MAX_IMAGES, PlanSizes, decoder_profiles, vision_profiles
from graphs.trt.report import PlanReport
from runtimes import records
from runtimes.bundle import Bundle
from runtimes.errors import ExportError, HostError, UsageError
from runtimes.gpu.kernel_file import KernelFile, hash_of
from runtimes.trt import load
from tests.gemma3_compile.builds import (
    TRT_KINDS,
    checkpoint_of,
    exported_once,
    ledger_of,
    nano_gguf,
    trt_request,
)
from tests.runtimes.manifests import write

SCHEMA = json.loads(resources.files("runtimes").joinpath("schema/manifest.schema.json").read_text())
SIZES = PlanSizes(batch=2, chunk=32)
TEXT_ONLY = ("int4",)


@pytest.fixture(scope="module")
def trt_bundles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Bundle]:
    folder = tmp_path_factory.mktemp("trt")
    gguf = {"checkpoint": nano_gguf(folder), "random_seed": None}
    with exported_once():
        made = {
            kind: build(trt_request(folder / kind, **changes, **(gguf if kind in TEXT_ONLY else {})))
            for kind, changes in TRT_KINDS.items()
        }
    return {kind: Bundle.open(path) for kind, path in made.items()}


def reports_of(bundle: Bundle) -> dict[str, PlanReport]:
    data = json.loads(bundle.path("plans.json").read_bytes())
    return {name: records.from_json(PlanReport, report, where=name) for name, report in data.items()}


@pytest.mark.parametrize("kind", TRT_KINDS)
class TestEveryBundle:
    def test_is_whole(self, trt_bundles: Mapping[str, Bundle], kind: str) -> None:
        bundle = trt_bundles[kind]
        bundle.verify()
        stages = ("decoder",) if kind in TEXT_ONLY else ("decoder", "vision")
        names = {f"{stage}.{end}" for stage in stages for end in ("onnx", "plan")}
        names |= {"weights.safetensors", "weights.json", "plans.json", "kernels.json", "tokenizer.model"}
        files = set(bundle.manifest.files)
        assert {name for name in files if not name.startswith("cubins/")} == names
        assert {stage: facts.plan for stage, facts in bundle.manifest.stages.items()} == {
            stage: f"{stage}.plan" for stage in stages
        }

    def test_has_a_manifest_of_the_published_schema(self, trt_bundles: Mapping[str, Bundle], kind: str) -> None:
        manifest = json.loads((trt_bundles[kind].root / "manifest.json").read_bytes())
        assert not [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)]

    def test_names_every_stored_tensor_in_its_ledger(self, trt_bundles: Mapping[str, Bundle], kind: str) -> None:
        bundle = trt_bundles[kind]
        with safe_open(bundle.path(bundle.manifest.weights.file), "pt") as file:
            stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        assert {row["name"]: row["shape"] for row in ledger_of(bundle)} == stored

    def test_has_plans_that_carry_its_kernels(self, trt_bundles: Mapping[str, Bundle], kind: str) -> None:
        """Each local layer and the pool; the file of kernels has cubins for every architecture."""
        bundle = trt_bundles[kind]
        text = bundle.path("kernels.json").read_bytes()
        file = KernelFile.loads(text)
        for name, report in reports_of(bundle).items():
            plugins = report.network.plugins
            assert {plugin.fields["kernels"] for plugin in plugins} == {hash_of(text)}
            assert len(plugins) == (1 if name == "vision" else 5)
            assert report.plan_bytes == bundle.path(f"{name}.plan").stat().st_size
            assert report.architectures == bundle.manifest.gpu_architectures
        assert tuple(f"sm_{number}" for number in file.architectures) == bundle.manifest.gpu_architectures
        for digest in file.cubins:
            assert hashlib.sha256(bundle.path(f"cubins/{digest}.cubin").read_bytes()).hexdigest() == digest

    def test_has_inputs_that_its_weights_file_has(self, trt_bundles: Mapping[str, Bundle], kind: str) -> None:
        """Where weights are inputs, each is an entry of the file under its own name; constants are no inputs."""
        bundle = trt_bundles[kind]
        with safe_open(bundle.path("weights.safetensors"), "pt") as file:
            entries = set(file.keys())
        used: set[str] = set()
        for name, report in reports_of(bundle).items():
            inputs = [tensor.name for tensor in report.network.inputs]
            own = [tensor.name for tensor in bundle.manifest.stages[name].inputs]
            assert inputs[: len(own)] == own
            used |= {fed.partition("@")[0] for fed in inputs[len(own) :]}
        assert used == (entries if bundle.manifest.settings["weights"] == "input" else set())

    def test_says_nothing_of_this_machine(self, trt_bundles: Mapping[str, Bundle], kind: str) -> None:
        root = trt_bundles[kind].root
        for path in root.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                assert str(root.parent).encode() not in data and str(Path.home()).encode() + b"/" not in data, path.name


def test_what_the_manifest_says(trt_bundles: Mapping[str, Bundle]) -> None:
    manifest = trt_bundles["bfloat16"].manifest
    assert manifest.target == "trt" and manifest.gpu_architectures == ("sm_80", "sm_86", "sm_89", "sm_120")
    assert (manifest.caches.dtype, manifest.caches.local_layout) == ("bfloat16", "ring")
    version = manifest.settings["tensorrt_version"]
    assert manifest.settings == {
        "flavour": "rtx",
        "tensorrt_version": version,
        "weights": "input",
        "prefill_chunk": 32,
        "max_batch": 2,
        "max_context": 96,
        "kernels": "kernels.json",
        "max_images": MAX_IMAGES,
    }
    assert manifest.producer["tensorrt-rtx"] == version and "triton" in manifest.producer
    stored = {kind: bundle.manifest.weights.dtype for kind, bundle in trt_bundles.items()}
    assert stored == {kind: kind for kind in TRT_KINDS}
    sources = {kind: bundle.manifest.settings["weights"] for kind, bundle in trt_bundles.items()}
    assert sources == {"bfloat16": "input", "int4": "constant", "fp8": "input"}


def test_the_plans_of_the_bundle(trt_bundles: Mapping[str, Bundle]) -> None:
    reports = reports_of(trt_bundles["bfloat16"])
    decoder, vision = reports["decoder"], reports["vision"]
    assert (decoder.profiles, vision.profiles) == (decoder_profiles(SIZES), vision_profiles(SIZES))
    layers = decoder.network.layers
    assert (layers["PLUGIN_V3"], layers["ATTENTION_INPUT"], layers["KV_CACHE_UPDATE"]) == (5, 1, 2)
    for layer, plugin in enumerate(decoder.network.plugins):
        assert plugin.aliases == {f"cache.{layer}.{part}.out": f"cache.{layer}.{part}" for part in ("k", "v")}
    slots = {t.name: t.shape[2] for t in decoder.network.inputs if t.name.startswith("cache.")}
    assert [slots[f"cache.{layer}.k"] for layer in range(6)] == [16] * 5 + [96]
    assert reports_of(trt_bundles["int4"])["decoder"].network.layers["DEQUANTIZE"] == 6 * 4 + 1, "and the tied head"
    assert reports_of(trt_bundles["fp8"])["decoder"].network.layers["DEQUANTIZE"] == 6 * 4


def test_the_weights_are_the_checkpoints(trt_bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    """In bfloat16, norms in fp32 with their 1."""
    bundle = trt_bundles["bfloat16"]
    with checkpoint_of("bfloat16", tmp_path) as checkpoint, safe_open(bundle.path("weights.safetensors"), "pt") as file:
        for row in ledger_of(bundle):
            sources = torch.cat([checkpoint.read(source["name"]).float() for source in row["sources"]])
            expected = (sources + ("1 added" in row["steps"])).to(getattr(torch, row["dtype"]))
            assert torch.equal(file.get_tensor(row["name"]), expected), row["name"]


class TestNvidiasTools:
    """What Polygraphy, trtexec and tensorrt_rtx would be given."""

    @pytest.mark.parametrize("stage", ["decoder", "vision"])
    def test_polygraphy_gets_a_network_with_plugins(
        self, trt_bundles: Mapping[str, Bundle], monkeypatch: pytest.MonkeyPatch, stage: str
    ) -> None:
        monkeypatch.setenv("GEMMA3C_BUNDLE", str(trt_bundles["bfloat16"].root))
        builder, network, parser = getattr(polygraphy_network, stage)()
        module = load("rtx")
        assert isinstance(builder, module.Builder) and isinstance(parser, module.OnnxParser)
        kinds = [network.get_layer(index).type.name for index in range(network.num_layers)]
        assert kinds.count("PLUGIN_V3") == (1 if stage == "vision" else 5)

    def test_polygraphy_is_told_what_is_wrong(
        self, trt_bundles: Mapping[str, Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv("GEMMA3C_BUNDLE", raising=False)
        with pytest.raises(UsageError, match="GEMMA3C_BUNDLE does not name a bundle"):
            polygraphy_network.decoder()
        monkeypatch.setenv("GEMMA3C_BUNDLE", str(trt_bundles["int4"].root))
        with pytest.raises(UsageError, match="has no vision; it has decoder"):
            polygraphy_network.vision()
        monkeypatch.setenv("GEMMA3C_BUNDLE", str(write(tmp_path / "ort").root))
        with pytest.raises(UsageError, match="is a bundle for ort, not for TensorRT"):
            polygraphy_network.decoder()

    def test_a_tool_without_plugins_takes_the_functions(self, trt_bundles: Mapping[str, Bundle]) -> None:
        """In a process of its own, in which no plugin is registered."""
        graph = trt_bundles["bfloat16"].path("decoder.onnx")
        command = [sys.executable, "-c", WITHOUT_PLUGINS, graph]
        kinds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        assert "PLUGIN_V3" not in kinds and kinds.count("ATTENTION_INPUT") == 6


WITHOUT_PLUGINS = """
import sys
from pathlib import Path
from graphs.trt.network import parse
from runtimes.trt import load

network = parse(load("rtx"), Path(sys.argv[1])).network
print(*(network.get_layer(index).type.name for index in range(network.num_layers)))
"""

AGAIN = """
import sys
from pathlib import Path
from gemma3_compile.pipeline import build
from tests.gemma3_compile.builds import trt_request

build(trt_request(Path(sys.argv[1])))
"""


def test_the_same_request_gives_the_same_bytes(trt_bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    """In another process, with another seed of Python's hashes and another destination."""
    first = trt_bundles["bfloat16"]
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "5"})
    same = first.manifest.files.keys()
    again = Bundle.open(tmp_path / "again").manifest
    differ = [name for name in same if first.manifest.files[name] != again.files.get(name)]
    assert not differ and again == first.manifest


@pytest.fixture
def fast_export() -> Iterator[None]:
    with exported_once():
        yield


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: for builds that fail later."""
    facts = type("Facts", (), {"hash": "", "file": "kernels.json", "tuning_records": (), "warnings": ()})
    monkeypatch.setattr("graphs.trt.kernels.write_kernels", lambda *arguments, **named: facts)


@pytest.mark.usefixtures("fast_export", "no_kernels")
class TestFailures:
    def test_a_builder_that_crashes_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        logs = tmp_path / "logs"
        logs.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(logs))
        monkeypatch.setattr(plan_build, "_WORKER", "tests.graphs.trt.bad_worker")
        with pytest.raises(ExportError, match=r"TensorRT's builder failed on decoder\.onnx: it ended with") as caught:
            build(trt_request(tmp_path / "deep" / "bundle", empty_weights=True))
        assert list(tmp_path.iterdir()) == [logs]
        assert [str(log) in caught.value.message for log in logs.iterdir()] == [True]

    def test_an_interrupt_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*arguments: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(trt, "build_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(trt_request(tmp_path / "bundle", empty_weights=True))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": (90,)}, "it makes no plans for sm_90"),
        ({"architectures": (75,)}, "sm_75 has no bfloat16"),
        ({"architectures": (80,), "dtype": "fp8"}, "sm_80 has no fp8 products"),
        ({"flavour": "full"}, "full TensorRT is not installed"),
    ],
)
def test_what_this_host_cannot_build(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HostError) as caught:
        build(trt_request(tmp_path / "bundle", **changes))
    assert message in caught.value.message and caught.value.hint and caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--arch", "sm_90"), 1, "it makes no plans for sm_90"),
        (("--arch", "sm_89", "--arch", "sm_80", "--dtype", "fp8"), 1, "sm_80 has no fp8 products"),
        (("--flavour", "full"), 1, "full TensorRT is not installed"),
        (("--arch", "89"), 2, "expected an architecture such as sm_80, but got '89'"),
        (("--context", "513"), 2, "the context 513 is longer than the 512 of nano"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    command = ["build", "--target", "trt", "--size", "nano", "--random-weights", "0", "--out", str(tmp_path / "bundle")]
    assert run([*command, *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and "hint: " in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fast_export")
def test_the_dry_run_explains_its_decisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", "--target", "trt", "--size", "nano", "--random-weights", "0", "--arch", "sm_80", "--dry-run"]
    assert run([*command, "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)
    decisions = {decision["name"]: (decision["choice"], decision["reason"]) for decision in asked["decisions"]}
    assert decisions["architectures"] == ("sm_80", "asked for")
    choice, reason = decisions["weights"]
    assert (
        choice == "input" and "a second copy of the " in reason and "for which the build takes about 1.50 GB" in reason
    )


def test_a_host_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "this_host", lambda: Host(installed=(), gpus=()))
    with pytest.raises(HostError, match="neither flavour of TensorRT is installed"):
        build(trt_request(tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


def test_a_host_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(HostError, match="compiled by triton, which is not installed") as caught:
        build(trt_request(tmp_path / "bundle", flavour="rtx"))
    assert "gemma3-compile[tune]" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fast_export")
def test_the_plan_tells_what_is_written(trt_bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    asked = plan(trt_request(tmp_path / "bundle"))
    manifest = trt_bundles["bfloat16"].manifest
    assert asked.target == "trt" and asked.context == 96
    assert asked.weights_bytes == manifest.files["weights.safetensors"].bytes
    # Keys and values of 2 heads of 32 numbers in bfloat16: 16 slots on five layers, 96 on one.
    assert asked.cache_bytes == 2 * 2 * 32 * 2 * (5 * 16 + 96)
    decisions = {decision.name: decision.choice for decision in asked.decisions}
    assert decisions == {"flavour": "rtx", "architectures": "sm_80, sm_86, sm_89, sm_120", "weights": "input"}
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_int4_explains_itself(tmp_path: Path) -> None:
    with exported_once():
        asked = plan(trt_request(tmp_path / "bundle", dtype="int4"))
    (weights,) = (decision for decision in asked.decisions if decision.name == "weights")
    assert weights.choice == "constant" and "second copy" in weights.reason
