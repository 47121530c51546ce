"""``kernels.json``: round trip, agreement with the published schema, sizes, and each way to be wrong."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from typing import Any, get_args

import jsonschema
import pytest

from runtimes.errors import BundleError
from runtimes.gpu import kernel_file as module
from runtimes.gpu.kernel_file import ITEM_BYTES, KernelFile, Role
from tests.runtimes.gpu.kernel_files import FIRST, SECOND, kernel_file, launch, variant

SCHEMA = json.loads(resources.files("runtimes").joinpath("schema/kernels.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_what_is_written_is_read_again() -> None:
    file = kernel_file()
    assert KernelFile.loads(file.dumps()) == file
    VALIDATOR.check_schema(SCHEMA)
    VALIDATOR.validate(json.loads(file.dumps()))


def test_schema_and_dataclasses_have_the_same_fields() -> None:
    classes = {
        cls.__name__: cls
        for cls in vars(module).values()
        if dataclasses.is_dataclass(cls) and isinstance(cls, type) and cls is not KernelFile
    }
    documented = {name: part for name, part in SCHEMA["$defs"].items() if "properties" in part}
    assert documented.keys() == classes.keys()
    for name, part in documented.items():
        fields = dataclasses.fields(classes[name])
        assert set(part["properties"]) == {field.name for field in fields}, name
        assert set(part["required"]) == {f.name for f in fields if f.default is dataclasses.MISSING}, name
    assert tuple(documented["KernelTensor"]["properties"]["role"]["enum"]) == get_args(Role)
    assert set(documented["KernelTensor"]["properties"]["type"]["enum"]) == set(ITEM_BYTES)


def test_the_first_variant_that_holds_is_the_one() -> None:
    facts = kernel_file().kernel("rows")
    assert facts.variant(90, {"B": 1, "S": 512}) is facts.variants[0]
    assert facts.variant(90, {"B": 1, "S": 513}) is facts.variants[1]
    assert facts.variant(120, {"B": 1, "S": 1}) is facts.variants[2]
    assert facts.variant(80, {"B": 1, "S": 1}) is None
    assert kernel_file().architectures == (90, 120)
    assert kernel_file().cubins == tuple(sorted((FIRST, SECOND)))


def test_where_workspaces_lie() -> None:
    """Every region begins at a multiple of 256 and overlaps none."""
    begins, scratch, size = variant().workspace({"B": 3, "S": 100})
    assert begins == {"_part": 0}
    assert scratch == (1280, 2048)  # 1200 bytes of _part; 6 programs of 128 bytes
    assert size == 2048
    assert variant().counters({"B": 3, "S": 100}) == ({"_zero_count": 0}, 256)


def replaced(path: str, value: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(kernel_file().dumps())
    *parents, last = path.split("/")
    place: Any = data
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return data


V = "kernels/rows/variants/0"
L = f"{V}/launches/0"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema_version", 2, "schema version 2, but gemma3c"),
        ("schema_version", None, "schema version None"),
        ("producer", 3, "producer: expected an object"),
        (f"{V}/when/0", "B", "not a condition"),
        (f"{V}/when/0", "N < 1", "names N, which is no dimension"),
        (f"{V}/architecture", "sm_90", "architecture: expected an integer"),
        (f"{V}/tensors/0/type", "*bf16", r"type '\*bf16'; known are"),
        (f"{V}/tensors/0/role", "both", "role: expected one of"),
        (f"{V}/tensors/0/shape/0", "heads", "names heads"),
        (f"{V}/tensors/0/name", "y", "points to the tensor 'x', which is listed 0 times"),
        (f"{L}/cubin", "../../etc/passwd", "64 lower-case hexadecimal digits"),
        (f"{L}/grid/0", "__import__('os')", "not of the language"),
        (f"{L}/grid", ["1", "1"], "a list of 3, but got 2"),
        (f"{L}/num_warps", 33, "1 <= num_warps <= 32"),
        (f"{L}/arguments/0/value", "3", "must be a tensor or a value, and is both"),
        (f"{L}/arguments/4/type", "*bf16", "does not go with what it is given"),
        (f"{L}/more", 1, "unknown field 'more'"),
        ("kernels/rows/dimensions/B", [0, 4], "1 <= low <= high"),
    ],
)
def test_faults_are_told(path: str, value: Any, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        KernelFile.loads(json.dumps(replaced(path, value)).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe"])
def test_what_is_no_kernel_file(text: bytes) -> None:
    with pytest.raises(BundleError, match=r"kernels\.json"):
        KernelFile.loads(text)


def test_a_kernel_that_is_not_there() -> None:
    with pytest.raises(BundleError, match="no kernel 'columns'; it has rows"):
        kernel_file().kernel("columns")


def test_sizes_of_a_launch() -> None:
    assert launch().programs({"B": 2, "S": 65}) == (2, 2, 1)
    assert launch().total_scratch_bytes({"B": 2, "S": 65}) == 512
    assert launch(scratch_bytes=0).total_scratch_bytes({"B": 2, "S": 65}) == 0
