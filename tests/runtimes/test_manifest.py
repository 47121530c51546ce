"""The manifest: round trip, agreement with the published schema, and each way to be wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
from importlib import resources
from typing import Any, get_args, get_type_hints

import jsonschema
import pytest

from runtimes import manifest as module
from runtimes.errors import BundleError
from runtimes.manifest import SCHEMA_VERSION, FileFacts, Manifest
from tests.runtimes.manifests import manifest

SCHEMA = json.loads(resources.files("runtimes").joinpath("schema/manifest.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FILES = {
    name: FileFacts(sha256="0" * 64, bytes=1)
    for name in ("decoder.onnx", "vision.onnx", "weights.safetensors", "weights.json", "tokenizer.model")
}


def example() -> dict[str, Any]:
    data = json.loads(manifest(files=FILES).dumps())
    assert isinstance(data, dict)
    return data


def test_what_is_written_is_read_again() -> None:
    whole = manifest(files=FILES, created="2026-01-01T00:00:00Z", receipt=None)
    assert Manifest.loads(whole.dumps()) == whole


def test_a_manifest_of_version_1_is_read() -> None:
    """It had no ``plan``."""
    data = example()
    data["schema_version"] = 1
    for stage in data["stages"].values():
        del stage["plan"]
    VALIDATOR.validate(data)
    assert Manifest.from_json(data) == manifest(files=FILES, schema_version=1)


def test_text_only_and_without_tokenizer_is_read_again() -> None:
    model = manifest().model
    tokens = dataclasses.replace(model.tokens, image=None, start_of_image=None, end_of_image=None)
    whole = manifest(tokenizer=None, model=dataclasses.replace(model, image=None, tokens=tokens))
    assert Manifest.loads(whole.dumps()) == whole


def test_example_obeys_the_published_schema() -> None:
    VALIDATOR.check_schema(SCHEMA)
    VALIDATOR.validate(example())


def test_schema_and_dataclasses_have_the_same_fields() -> None:
    classes = {
        cls.__name__: cls
        for cls in vars(module).values()
        if dataclasses.is_dataclass(cls) and isinstance(cls, type) and cls is not Manifest
    }
    documented = {name: part for name, part in SCHEMA["$defs"].items() if "properties" in part}
    assert set(documented) == set(classes)
    for name, part in [("Manifest", SCHEMA), *documented.items()]:
        fields = dataclasses.fields(classes.get(name, Manifest))
        assert set(part["properties"]) == {field.name for field in fields}, name
        obligatory = {
            field.name
            for field in fields
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        assert set(part.get("required", [])) == obligatory | ({"schema_version"} if part is SCHEMA else set()), name
    assert SCHEMA["properties"]["schema_version"]["enum"] == list(range(1, SCHEMA_VERSION + 1))
    assert get_args(get_type_hints(Manifest)["target"]) == tuple(SCHEMA["properties"]["target"]["enum"])


def set_at(data: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    place: Any = data
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value


# Where, what, what the message must say, and whether the JSON Schema sees it too.
FAULTS = [
    ("schema_version", "1", "schema_version", True),
    ("schema_version", 0, "schema_version", True),
    ("schema_version", True, "schema_version", True),
    ("target", "tpu", "target: expected one of 'ort'", True),
    ("target", 1, "expected one of", True),
    ("surprise", 1, "unknown field 'surprise'", True),
    ("producer", {"torch": "2"}, "producer", True),
    ("producer", {"gemma3c": 1}, "producer['gemma3c']: expected a string", True),
    ("model/vocab_size", "512", "model.vocab_size: expected an integer", True),
    ("model/vocab_size", True, "model.vocab_size: expected an integer, but got True", True),
    ("model/vocab_size", 512.5, "expected an integer", True),
    ("model/vocab_size", 100, "0 <= token < 100", False),
    ("model/hidden_size", 0, "hidden_size >= 1", True),
    ("model/layers", [], "layers", True),
    ("model/layers/3/window", None, "model.layers[3]: a local layer has a window", True),
    ("model/layers/5/window", 16, "global one has none", True),
    ("model/layers/0/kind", "ring", "layers[0].kind", True),
    ("model/layers/0/heads", 1, "unknown field 'heads'", True),
    ("model/tokens/end", [], "tokens.end", True),
    ("model/tokens/image", None, "three image token ids", False),
    ("model/image/mean", [0.5, 0.5], "model.image.mean: expected a list of 3", True),
    ("model/image/std", [0.5, 0.5, 0], "min(std) > 0", False),
    ("model/image/pan_and_scan/max_num_crops", 0, "max_num_crops >= 1", True),
    ("caches/local_layout", "linear", "caches.local_layout", True),
    ("stages", {}, "needs the stage 'decoder'", True),
    ("stages/decoder/graph", "../decoder.onnx", "not a plain path inside the bundle", True),
    ("stages/decoder/plan", "a/../b", "`stages['decoder'].plan` names the file", True),
    ("stages/decoder/inputs", {}, "stages['decoder'].inputs: expected a list", True),
    ("stages/decoder/inputs/0", 7, "inputs[0]: expected an object", True),
    ("probes", {"encoder": []}, "`probes` names the stage 'encoder'", False),
    ("settings", {"a": []}, "settings['a']: expected true or false or an integer", True),
    ("weights/file", "/etc/passwd", "not a plain path inside the bundle", True),
    ("weights/ledger", "a/../../b", "not a plain path inside the bundle", True),
    ("tokenizer/file", "..\\x", "not a plain path inside the bundle", True),
    ("tokenizer/kind", "bpe", "tokenizer.kind", True),
    ("receipt", "C:/x", "not a plain path inside the bundle", True),
    ("tuning_records", ["./x"], "not a plain path inside the bundle", True),
    ("files", {"a//b": {"sha256": "0" * 64, "bytes": 1}}, "not a plain path inside the bundle", True),
    ("files", {"manifest.json": {"sha256": "0" * 64, "bytes": 1}}, "its own hash", False),
    ("files/weights.json/sha256", "xyz", "files['weights.json']: `sha256` must be 64", True),
    ("files/weights.json/bytes", -1, "bytes >= 0", True),
]


@pytest.mark.parametrize(("path", "value", "message", "schema_sees_it"), FAULTS, ids=lambda x: repr(x)[:40])
def test_fault_is_named(path: str, value: Any, message: str, schema_sees_it: bool) -> None:
    data = example()
    set_at(data, path, value)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(data)
    assert message in caught.value.message
    assert VALIDATOR.is_valid(data) is not schema_sees_it


@pytest.mark.parametrize("name", ["model", "target", "stages", "weights", "tokenizer", "caches", "producer"])
def test_missing_field_is_named(name: str) -> None:
    data = example()
    del data[name]
    with pytest.raises(BundleError, match=f"the field '{name}' is missing"):
        Manifest.from_json(data)
    assert not VALIDATOR.is_valid(data)


def test_newer_schema_names_the_version_that_made_it() -> None:
    data = {"schema_version": SCHEMA_VERSION + 1, "producer": {"gemma3c": "7.3.1"}, "novelty": []}
    with pytest.raises(BundleError, match=r"schema version 3, written by gemma3c 7\.3\.1.*up to 2") as caught:
        Manifest.from_json(data)
    assert caught.value.hint is not None
    assert "gemma3-compile>=7.3.1" in caught.value.hint


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema_version": NaN}', b"[" * 100_000])
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.loads(text)


def test_a_name_that_stands_twice_is_refused() -> None:
    text = manifest().dumps().replace(b'"target": "ort"', b'"target": "cuda", "target": "ort"')
    with pytest.raises(BundleError, match="the name 'target' stands twice"):
        Manifest.loads(text)


def test_a_reference_that_files_does_not_list_is_named() -> None:
    files = copy.copy(FILES)
    del files["vision.onnx"]
    with pytest.raises(BundleError, match=r"stages\['vision'\]\.graph.*'vision\.onnx'"):
        manifest(files=files).check_references()
    stages = {name: dataclasses.replace(stage, plan="a.plan") for name, stage in manifest().stages.items()}
    with pytest.raises(BundleError, match=r"stages\['decoder'\]\.plan.*'a\.plan'"):
        manifest(files=FILES, stages=stages).check_references()


def test_an_integer_is_taken_where_a_number_is_expected() -> None:
    data = example()
    set_at(data, "model/image/rescale", 1)
    image = Manifest.from_json(data).model.image
    assert image is not None
    assert isinstance(image.rescale, float)
