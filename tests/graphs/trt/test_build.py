"""Plans of nano, really built by TensorRT for RTX without a GPU, for four architectures each; and builds that go wrong."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from graphs.onnx_lowering.context import TrtOptions, WeightSource
from graphs.onnx_lowering.lower import LoweredStage, bind_weights, weight_inputs
from graphs.trt import build as module
from graphs.trt.build import PlanRequest, build_plan, emitted_by
from graphs.trt.network import parse
from graphs.trt.profiles import PlanSizes, decoder_profiles, vision_profiles
from graphs.trt.report import BuiltPlan, TensorReport
from graphs.weights import WeightsPlan
from graphs.weights_file import WeightsFile, WeightsLayout
from runtimes.errors import ExportError
from runtimes.trt import load, register_plugins
from tests.graphs.trt_nano import CONTEXT, STAGES, lowered_trt, trt_stage

ARCHITECTURES = (80, 86, 89, 120)
SIZES = PlanSizes(batch=2, chunk=64)
WINDOW, SCALE, LOCAL_LAYERS = 16, 32**-0.5, 5


def write_stage(folder: Path, name: str, weights: WeightSource) -> LoweredStage:
    """NAME.onnx over a weights file of zeros."""
    lowered = lowered_trt(name, TrtOptions(weights=weights, context=CONTEXT))
    layout = WeightsLayout(WeightsPlan.merge([lowered.stored]))
    with WeightsFile(folder / f"{name}.safetensors", layout):
        bind_weights(lowered, file=f"{name}.safetensors", offsets=layout.offsets, folder=folder)
    (folder / f"{name}.onnx").write_bytes(ir.to_proto(lowered.model).SerializeToString(deterministic=True))
    return lowered


def request(name: str, **changes: object) -> PlanRequest:
    base = PlanRequest(
        onnx=f"{name}.onnx",
        plan=f"{name}.plan",
        flavour="rtx",
        architectures=ARCHITECTURES,
        profiles=vision_profiles(SIZES) if name == "vision" else decoder_profiles(SIZES),
        kernels=False,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def lowered(folder: Path) -> Mapping[str, LoweredStage]:
    return {name: write_stage(folder, name, "input") for name in STAGES}


@pytest.fixture(scope="module")
def built(folder: Path, lowered: Mapping[str, LoweredStage]) -> Mapping[str, BuiltPlan]:
    return {name: build_plan(folder, request(name)) for name in lowered}


@pytest.mark.parametrize("name", STAGES)
class TestEveryPlan:
    def test_is_written(self, built: Mapping[str, BuiltPlan], folder: Path, name: str) -> None:
        report = built[name].report
        assert (folder / f"{name}.plan").stat().st_size == report.plan_bytes > 1_000_000
        assert report.architectures == ("sm_80", "sm_86", "sm_89", "sm_120")
        assert (report.flavour, report.tensorrt_version) == ("rtx", load("rtx").__version__)
        assert 0 < built[name].seconds < 300 and 1e8 < built[name].peak_rss_bytes < 3e9

    def test_takes_the_stages_inputs_and_the_weights(
        self, built: Mapping[str, BuiltPlan], lowered: Mapping[str, LoweredStage], name: str
    ) -> None:
        stage = trt_stage(name)
        expected = [TensorReport(name=s.name, dtype=s.dtype, shape=s.shape) for s in stage.inputs]
        expected += [
            TensorReport(name=fed, dtype=entry.dtype, shape=entry.shape)
            for fed, entry in weight_inputs(lowered[name]).items()
        ]
        assert list(built[name].report.network.inputs) == expected

    def test_gives_the_stages_outputs(self, built: Mapping[str, BuiltPlan], name: str) -> None:
        """With the caches' dimensions as numbers, all but the batch."""
        outputs = {t.name: t for t in built[name].report.network.outputs}
        for spec in trt_stage(name).outputs:
            found = outputs.pop(spec.name)
            assert (found.dtype, len(found.shape)) == (spec.dtype, len(spec.shape))
            numbers = zip(found.shape, spec.shape, strict=True)
            assert all(a == b for a, b in numbers if isinstance(a, int) and isinstance(b, int))
        assert not outputs

    def test_is_the_same_bytes_again(
        self, built: Mapping[str, BuiltPlan], folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """From another folder, with other variables in the environment."""
        if not built[name].fixed_addresses:
            pytest.skip("this system draws the addresses of memory at random")
        other = folder / "a folder with a longer name" / name
        other.mkdir(parents=True)
        (other / f"{name}.onnx").write_bytes((folder / f"{name}.onnx").read_bytes())
        monkeypatch.setenv("PYTHONHASHSEED", "7")
        monkeypatch.setenv("SOMETHING_LONG", "x" * 10_000)
        again = build_plan(other, request(name))
        assert again.report == built[name].report
        assert _digest(other / f"{name}.plan") == _digest(folder / f"{name}.plan")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_decoders_layers(built: Mapping[str, BuiltPlan]) -> None:
    """Five local layers are plugins, the global one is TensorRT's attention over caches that it updates in place."""
    report = built["decoder"].report
    layers = report.network.layers
    assert layers["PLUGIN_V3"] == LOCAL_LAYERS
    assert (layers["ATTENTION_INPUT"], layers["ATTENTION_OUTPUT"], layers["KV_CACHE_UPDATE"]) == (1, 1, 2)
    assert layers["MATRIX_MULTIPLY"] == 6 * 4 + 1, "qkv, o, gate and up, down in each layer, and the head"
    assert "NORMALIZATION" not in layers, "RMSNorm is written out: TensorRT's rounds before the scale"
    assert report.profiles == decoder_profiles(SIZES)


def test_the_decoders_plugins(built: Mapping[str, BuiltPlan]) -> None:
    plugins = built["decoder"].report.network.plugins
    for layer, plugin in enumerate(plugins):
        assert plugin.plugin == "gemma3c::SlidingWindowAttention"
        assert emitted_by(plugin.layer) == "graphs/onnx_lowering/trt_plugins.py"
        assert plugin.fields["window"] == WINDOW and plugin.fields["scale"] == pytest.approx(SCALE)
        assert plugin.aliases == {f"cache.{layer}.{part}.out": f"cache.{layer}.{part}" for part in ("k", "v")}
    assert len(plugins) == LOCAL_LAYERS


def test_the_vision_towers_plugin(built: Mapping[str, BuiltPlan]) -> None:
    report = built["vision"].report
    (plugin,) = report.network.plugins
    assert plugin.plugin == "gemma3c::SigLIPPool" and not plugin.aliases
    assert plugin.fields == {"pool": 2, "eps": pytest.approx(1e-6), "kernels": ""}
    assert report.network.layers["ATTENTION_INPUT"] == 2 and report.profiles == vision_profiles(SIZES)


def test_weights_as_constants_lie_in_the_plan(folder: Path, built: Mapping[str, BuiltPlan]) -> None:
    target = folder / "constants"
    target.mkdir()
    lowered = write_stage(target, "vision", "constant")
    report = build_plan(target, request("vision", architectures=(80,))).report
    assert [tensor.name for tensor in report.network.inputs] == ["pixels"]
    assert sum(entry.size_bytes for entry in lowered.stored) < report.plan_bytes
    assert len(built["vision"].report.network.inputs) > 1


@pytest.mark.parametrize("name", STAGES)
def test_attention_reads_its_inputs_as_they_are(folder: Path, lowered: Mapping[str, LoweredStage], name: str) -> None:
    """No product with 1 stands before it, and where it reads a cache it knows how far that is filled."""
    trt = load("rtx")
    register_plugins(trt, None)
    network = parse(trt, folder / f"{name}.onnx").network
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(i).name: layer.type.name for layer in layers for i in range(layer.num_outputs)}
    attentions = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    assert attentions
    for layer in attentions:
        layer.__class__ = trt.IAttentionInputLayer
        queries, keys = (producers[layer.attention.get_input(index).name] for index in (0, 1))
        lengths = layer.attention.key_value_lengths
        if name == "decoder":
            assert (queries, keys, lengths.name) == ("SHUFFLE", "KV_CACHE_UPDATE", "chunk.filled")
        else:
            assert (queries, keys, lengths) == ("CAST", "SHUFFLE", None)


@pytest.mark.parametrize("name", STAGES)
def test_every_node_knows_the_file_that_emitted_it(
    folder: Path, lowered: Mapping[str, LoweredStage], name: str
) -> None:
    nodes = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph.node
    files = {node.name: emitted_by(node.name) for node in nodes}
    unknown = [node for node, file in files.items() if file is None]
    assert not unknown
    assert (
        files["linear/MatMul" if name == "vision" else "linear_default/MatMul"] == "graphs/onnx_lowering/trt_rules.py"
    )
    assert all((Path(__file__).parents[3] / file).is_file() for file in {*files.values()} if file is not None)


Damage = Callable[[onnx.ModelProto], None]


def _unknown_op(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.name == "rms_norm/Sqrt").op_type = "Sqrrt"


def _wrong_axis(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.name == "embedding/Gather")
    next(a for a in node.attribute if a.name == "axis").i = 9


def _missing_attribute(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "SlidingWindowAttention")
    kept = [attribute for attribute in node.attribute if attribute.name != "window"]
    del node.attribute[:]
    node.attribute.extend(kept)


REFUSED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "an operator that nobody knows": (
        _unknown_op,
        ("rms_norm/Sqrt", "Sqrrt", "emitted by graphs/onnx_lowering/trt_rules.py"),
    ),
    "an attribute out of range": (
        _wrong_axis,
        ("embedding/Gather (Gather)", "emitted by graphs/onnx_lowering/trt_rules.py"),
    ),
    "a plugin without an attribute": (_missing_attribute, ("lacks the attribute window",)),
}


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where logs are kept."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize("fault", REFUSED)
def test_what_the_parser_refuses(
    folder: Path, lowered: Mapping[str, LoweredStage], tmp_path: Path, logs: Path, fault: str
) -> None:
    damage, facts = REFUSED[fault]
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    damage(model)
    onnx.save(model, tmp_path / "decoder.onnx")
    with pytest.raises(ExportError) as caught:
        build_plan(tmp_path, request("decoder"))
    for fact in (*facts, "the whole log: "):
        assert fact in caught.value.message, caught.value.message
    (log,) = logs.iterdir()
    assert str(log) in caught.value.message and "[TRT]" in log.read_text()
    assert not (tmp_path / "decoder.plan").exists()


def test_sizes_that_do_not_go_together(
    folder: Path, lowered: Mapping[str, LoweredStage], tmp_path: Path, logs: Path
) -> None:
    """Profiles of the vision tower name no dimension of the decoder."""
    with pytest.raises(ExportError, match="no profile says how large the dimension 'B'"):
        build_plan(folder, request("decoder", plan="wrong.plan", profiles=vision_profiles(SIZES)))
    assert not (folder / "wrong.plan").exists()


ENDINGS = {
    "abort": "it ended with SIGABRT",
    "kill": "it ended with SIGKILL",
    "hang": "it was not done within 3 s",
    "exit": "it ended with exit code 7",
    "silence": "it wrote no report",
}


@pytest.mark.parametrize("how", ENDINGS)
def test_a_builder_that_goes_wrong(tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(module, "_WORKER", "tests.graphs.trt.bad_worker")
    (tmp_path / "goes_wrong").write_text(how)
    with pytest.raises(ExportError) as caught:
        build_plan(tmp_path, request("decoder"), limit_s=3.0)
    message = caught.value.message
    assert f"TensorRT's builder failed on decoder.onnx: {ENDINGS[how]}" in message
    assert "line 8 of TensorRT" in message and "line 2 of TensorRT" not in message
    (log,) = logs.iterdir()
    assert str(log) in message and log.read_text().startswith("line 0 of TensorRT")
    assert (caught.value.hint is not None) == (how == "kill")
    assert not (tmp_path / "decoder.plan").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
