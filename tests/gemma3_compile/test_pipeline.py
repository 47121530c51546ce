"""Whole builds of nano, in every dtype and from a GGUF: what lies in the bundle, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import runtimes
from gemma3_compile.checkpoints import Checkpoint, load_eager
from gemma3_compile.formats import EMBEDDING, is_linear
from gemma3_compile.model import Gemma3
from gemma3_compile.pipeline import build
from graphs.weights import BlockFormat, Weight, ZeroPoints
from runtimes.bundle import Bundle
from runtimes.errors import BundleError
from runtimes.session import Chunk, Session, open_session
from tests.gemma3_compile.builds import KINDS, SEED, checkpoint_of, ledger_of, request
from tests.graphs.unpacking import stored_values
from tests.tolerances import check

SCHEMA = Path(runtimes.__file__).parent / "schema" / "manifest.schema.json"


@pytest.mark.parametrize("kind", KINDS)
class TestEveryBundle:
    def test_is_whole(self, bundles: Mapping[str, Bundle], kind: str) -> None:
        if kind == "empty":
            with pytest.raises(BundleError, match=r"weights\.safetensors: expected sha256 000000000000"):
                bundles[kind].verify()
        else:
            bundles[kind].verify()
        text_only = kind == "kept"
        graphs = {"decoder.onnx"} if text_only else {"decoder.onnx", "decoder_image.onnx", "vision.onnx"}
        expected = {*graphs, "weights.safetensors", "weights.json", "tokenizer.model"}
        assert set(bundles[kind].manifest.files) == expected
        assert {path.name for path in bundles[kind].root.iterdir()} == {*expected, "manifest.json"}

    def test_has_a_manifest_of_the_published_schema(self, bundles: Mapping[str, Bundle], kind: str) -> None:
        manifest = json.loads((bundles[kind].root / "manifest.json").read_bytes())
        validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_bytes()))
        assert not [error.message for error in validator.iter_errors(manifest)]

    def test_names_every_stored_tensor_in_its_ledger(self, bundles: Mapping[str, Bundle], kind: str) -> None:
        bundle = bundles[kind]
        dtypes = {"F32": "float32", "U8": "uint8"}
        with safe_open(bundle.path(bundle.manifest.weights.file), "np") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            stored = {name: (dtypes[s.get_dtype()], s.get_shape()) for name, s in slices.items()}
        rows = ledger_of(bundle)
        assert {row["name"]: (row["dtype"], row["shape"]) for row in rows} == stored
        assert len(rows) == len(stored)
        assert all(row["steps"] and row["sources"] for row in rows)

    def test_uses_every_tensor_of_the_checkpoint_once(
        self, bundles: Mapping[str, Bundle], kind: str, builds_folder: Path
    ) -> None:
        """No tensor enters two weights; the parts of one weight name the same sources."""
        with checkpoint_of(kind, builds_folder) as checkpoint:
            names = sorted(checkpoint.names())
        parts = (".scales", ".zeros", ".minimums")
        rows = [row for row in ledger_of(bundles[kind]) if not row["name"].endswith(parts)]
        assert sorted(source["name"] for row in rows for source in row["sources"]) == names

    def test_points_into_its_weights_file(self, bundles: Mapping[str, Bundle], kind: str) -> None:
        """Every initializer is the bytes of one entry: its offset and its length, no byte beyond the file."""
        bundle = bundles[kind]
        raw = bundle.path("weights.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        spans = {
            (start + h["data_offsets"][0], h["data_offsets"][1] - h["data_offsets"][0])
            for n, h in header.items()
            if n != "__metadata__"
        }
        seen = set()
        for stage in bundle.manifest.stages.values():
            model = onnx.load(bundle.path(stage.graph), load_external_data=False)
            for tensor in model.graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    where = {entry.key: entry.value for entry in tensor.external_data}
                    assert where["location"] == "weights.safetensors"
                    seen.add((int(where["offset"]), int(where["length"])))
        assert seen == spans
        assert max(begin + length for begin, length in spans) == len(raw)

    def test_has_a_probe_for_each_layer(self, bundles: Mapping[str, Bundle], kind: str) -> None:
        bundle = bundles[kind]
        layers = {"decoder": 6, "decoder_image": 6, "vision": 2}
        for name, stage in bundle.manifest.stages.items():
            model = onnx.load(bundle.path(stage.graph), load_external_data=False)
            values = {output for node in model.graph.node for output in node.output}
            probes = bundle.manifest.probes[name]
            assert len(set(probes)) == layers[name] and values.issuperset(probes)

    def test_says_nothing_of_this_machine(self, bundles: Mapping[str, Bundle], kind: str, builds_folder: Path) -> None:
        for name in ("manifest.json", "weights.json", "decoder.onnx"):
            data = (bundles[kind].root / name).read_bytes()
            assert str(builds_folder).encode() not in data and str(Path.home()).encode() not in data, name


@pytest.mark.parametrize(
    ("kind", "dtype", "activations"),
    [
        ("float32", "float32", None),
        ("auto", "float32", None),
        ("int8", "int8", "int16"),
        ("int4", "int4", "int8"),
        ("int4 exact", "int4", "int16"),
        ("kept", "kept", "int16"),
    ],
)
def test_what_the_manifest_says(bundles: Mapping[str, Bundle], kind: str, dtype: str, activations: str | None) -> None:
    manifest = bundles[kind].manifest
    assert (manifest.weights.dtype, manifest.settings.get("activations")) == (dtype, activations)
    assert manifest.model.max_context == 512 and [layer.window for layer in manifest.model.layers] == [16] * 5 + [None]
    assert (manifest.model.image is None) == (kind == "kept")
    assert manifest.created is None and manifest.target == "ort"


def test_float32_from_auto_is_float32(bundles: Mapping[str, Bundle]) -> None:
    """Random weights are on no grid."""
    one, other = bundles["auto"].manifest.files, bundles["float32"].manifest.files
    assert one == other


def test_the_kept_grid_is_said_tensor_by_tensor(bundles: Mapping[str, Bundle]) -> None:
    steps = {row["name"]: " | ".join(row["steps"]) for row in ledger_of(bundles["kept"])}
    qk = "decoder.layers.0.self_attn.{}_proj.weight.codes"
    assert "4 bits in blocks of 32: the checkpoint's own q4_0 grid, exactly" in steps[qk.format("q")]
    assert "8 bits in blocks of 32: the checkpoint's own q8_0 grid, exactly" in steps[qk.format("v")]
    assert "q5_0 grid, exactly" in steps["decoder.layers.0.mlp.down_proj.weight.codes"]
    assert steps["decoder.layers.0.mlp.gate_proj.weight"] == "stored as float32"
    assert steps["decoder.norm.weight"] == "1 added | stored as float32"


def test_quantised_bundles_are_smaller(bundles: Mapping[str, Bundle]) -> None:
    size = {kind: bundles[kind].manifest.files["weights.safetensors"].bytes for kind in KINDS}
    assert size["int4"] < size["int8"] < 0.4 * size["float32"]


def check_logits(session: Session, model: Gemma3, row: str) -> None:
    """Two chunks past the window and three steps."""
    token_ids = torch.randint(4, 500, (24,), generator=torch.Generator().manual_seed(3))
    caches, eager_caches, start = session.open_caches(1, 64), model.decoder.empty_caches(1, 64), 0
    for size in (14, 7, 1, 1, 1):
        part = token_ids[start : start + size]
        expected, eager_caches = model.decoder(
            part[None], torch.tensor([start]), torch.tensor([size]), torch.tensor([[size - 1]]), eager_caches
        )
        if size == 1:
            ours = session.step(caches, part.numpy())
        else:
            chunk = Chunk(token_ids=part.numpy(), features=None, feature_rows=None, image_ids=None)
            ours = session.extend(caches, 0, chunk)
        check(row, np.array(ours)[0], expected[0, 0], f"{size} tokens at {start}")
        start += size


def weight_of(name: str, row: Mapping[str, Any], shape: tuple[int, ...], tensors: Mapping[str, object]) -> Weight:
    """The recipe of a quantised weight, from what the ledger says in words."""
    found = re.search(r"(4|8) bits in blocks of (\d+)", " ".join(row["steps"]))
    assert found is not None
    zero_points: ZeroPoints = "integer" if f"{name}.zeros" in tensors else "none"
    form = BlockFormat(bits=4 if found[1] == "4" else 8, block_size=int(found[2]), zero_points=zero_points)
    weight = Weight(sources=tuple(s["name"] for s in row["sources"]), shape=shape, dtype="float32", format=form)
    assert weight.name == name
    return weight


def model_of(bundle: Bundle, checkpoint: Checkpoint) -> Gemma3:
    """The eager model with the weights that the bundle's file and ledger mean."""
    tensors = load_file(bundle.path(bundle.manifest.weights.file))
    state: dict[str, torch.Tensor] = {}
    for row in ledger_of(bundle):
        name = row["name"]
        sources = [source["name"] for source in row["sources"]]
        rows = [checkpoint.info(source).shape[0] for source in sources]
        if name.endswith(".codes"):
            shape = (sum(rows), checkpoint.info(sources[0]).shape[1])
            weight = weight_of(name.removesuffix(".codes"), row, shape, tensors)
            values = torch.from_numpy(stored_values(tensors, weight))
        elif name.endswith((".scales", ".zeros", ".minimums")):
            continue
        else:
            values = torch.from_numpy(tensors[name] - ("1 added" in row["steps"]))
        state |= dict(zip(sources, values.split(rows), strict=True))
    model = load_eager(checkpoint)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("kind", ["float32", "kept", "int8", "int4 exact"])
def test_the_bundle_computes_what_its_weights_mean(
    bundles: Mapping[str, Bundle], builds_folder: Path, kind: str
) -> None:
    """``int4 exact`` is int4 with int16 activations."""
    with checkpoint_of(kind, builds_folder) as checkpoint:
        model = model_of(bundles[kind], checkpoint)
    with open_session(bundles[kind], provider="cpu", threads=1) as session, torch.no_grad():
        check_logits(session, model, "ort.logits" if kind == "float32" else "ort.quantised_logits")


@pytest.mark.parametrize(("kind", "limit"), [("float32", 0.0), ("kept", 0.0), ("int8", 0.01), ("int4", 0.12)])
def test_the_weights_are_the_checkpoints(
    bundles: Mapping[str, Bundle], builds_folder: Path, kind: str, limit: float
) -> None:
    """Exactly, or within what rounding to blocks of 32 leaves of each tensor's norm; (1 + w) - 1 loses a bit of w."""
    with checkpoint_of(kind, builds_folder) as checkpoint:
        state = model_of(bundles[kind], checkpoint).state_dict()
        for name, ours in state.items():
            theirs = checkpoint.read(name).float()
            error = float((ours - theirs).norm() / theirs.norm())
            assert error <= max(limit, 1e-6 if ours.dim() == 1 else 0.0), f"{name} errs by {error:.3g}"


AGAIN = """
import sys
from pathlib import Path
from gemma3_compile.pipeline import BuildRequest, build

build(BuildRequest(target="ort", out=Path(sys.argv[1]), size="nano", random_seed=int(sys.argv[2]), dtype="int4"))
"""


def test_the_same_request_gives_the_same_bytes(bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    """In another process, with another seed of Python's hashes and another destination."""
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "again"), str(SEED)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "5"})
    for name in (*bundles["int4"].manifest.files, "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (bundles["int4"].root / name).read_bytes(), name


@pytest.mark.usefixtures("fast_export")
def test_another_seed_gives_other_weights(bundles: Mapping[str, Bundle], tmp_path: Path) -> None:
    other = Bundle.open(build(request(tmp_path / "other", random_seed=SEED + 1))).manifest.files
    same = bundles["float32"].manifest.files
    assert {name for name in same if same[name] != other[name]} == {"weights.safetensors"}


def test_empty_weights_are_a_hole(bundles: Mapping[str, Bundle]) -> None:
    facts = bundles["empty"].path("weights.safetensors").stat()
    header = int.from_bytes(bundles["empty"].path("weights.safetensors").read_bytes()[:8], "little") + 8
    assert facts.st_size == bundles["float32"].manifest.files["weights.safetensors"].bytes
    assert facts.st_blocks * 512 <= header + 2 * 4096
    with safe_open(bundles["empty"].path("weights.safetensors"), "np") as file:
        assert not file.get_tensor(EMBEDDING).any()


def test_the_dtypes_differ_in_linear_layers_only(bundles: Mapping[str, Bundle]) -> None:
    plain = {row["name"]: row for row in ledger_of(bundles["float32"])}
    for row in ledger_of(bundles["int8"]):
        sources = [entry["name"] for entry in row["sources"]]
        if not any(is_linear(name) or name == EMBEDDING for name in sources):
            assert row == plain[row["name"]]
