"""From ``--dtype`` to a block format for each tensor."""

from __future__ import annotations

import pytest
import torch

from gemma3_compile.checkpoints.random_weights import RandomCheckpoint
from gemma3_compile.formats import (
    DTYPES,
    EMBEDDING,
    INT4,
    INT8,
    TRT_DTYPES,
    TRT_FP8,
    TRT_INT4,
    TRT_INT8,
    TrtDtype,
    choose_formats,
    default_activations,
    is_linear,
    stored_dtype,
    trt_formats,
)
from gemma3_compile.model import Gemma3
from gemma3_compile.presets import preset
from graphs.weights import BlockFormat
from runtimes.errors import UsageError
from tests.gemma3_compile.memory_checkpoint import MemoryCheckpoint, random_grid

NANO = RandomCheckpoint(preset("nano"), 0)
LAYER = "decoder.layers.0."


def test_exactly_the_linear_layers_are_linear() -> None:
    """Told apart by name alone; held here against the modules themselves."""
    with torch.device("meta"):
        modules = dict(Gemma3(preset("nano")).named_modules())
    linear = {f"{name}.weight" for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    assert linear == {name for name in NANO.names() if is_linear(name)}
    assert len(linear) == 6 * 7 + 2 * 6


def test_float32_quantises_nothing() -> None:
    assert choose_formats(NANO, "float32") == {}


@pytest.mark.parametrize(("dtype", "form"), [("int8", INT8), ("int4", INT4)])
def test_int8_and_int4_take_every_linear_layer_and_the_table(dtype: str, form: BlockFormat) -> None:
    """The tower stays in 8 bits: it is small beside the decoder, and its errors reach every image token."""
    formats = choose_formats(NANO, dtype)
    assert formats.keys() == {EMBEDDING, *(name for name in NANO.names() if is_linear(name))}
    assert {f for name, f in formats.items() if name.startswith("decoder.")} == {form}
    assert {f for name, f in formats.items() if name.startswith("vision.")} == {INT8}


def test_auto_without_a_grid_keeps_floats() -> None:
    assert choose_formats(NANO, "auto") == {}


@pytest.mark.parametrize(
    ("kind", "bits", "size", "zero_points"),
    [
        ("q4_0", 4, 32, "none"),
        ("q4_K", 4, 32, "minimum"),
        ("q5_0", 8, 32, "none"),
        ("q6_K", 8, 16, "none"),
        ("q8_0", 8, 32, "none"),
    ],
)
def test_auto_keeps_a_grid(kind: str, bits: int, size: int, zero_points: str) -> None:
    name = LAYER + "mlp.up_proj.weight"
    checkpoint = MemoryCheckpoint({}, {name: (kind, random_grid(kind, 4, 64))})
    (form,) = choose_formats(checkpoint, "auto").values()
    assert (form.bits, form.block_size, form.zero_points) == (bits, size, zero_points)


def test_auto_takes_each_tensor_as_it_comes() -> None:
    grids = {
        EMBEDDING: ("q6_K", random_grid("q6_K", 8, 64)),
        LAYER + "self_attn.q_proj.weight": ("q4_K", random_grid("q4_K", 8, 64)),
        LAYER + "self_attn.v_proj.weight": ("q8_0", random_grid("q8_0", 8, 64)),
        LAYER + "input_layernorm.weight": ("q8_0", random_grid("q8_0", 1, 64)),  # no linear layer: it stays in floats
    }
    checkpoint = MemoryCheckpoint({LAYER + "mlp.up_proj.weight": torch.zeros(4, 64)}, grids)
    formats = choose_formats(checkpoint, "auto")
    assert formats.keys() == {EMBEDDING, LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.v_proj.weight"}
    assert formats[EMBEDDING].block_size == 16


def test_a_table_with_minimums_goes_to_eight_bits() -> None:
    """ONNX Runtime has no lookup in a table with minimums."""
    checkpoint = MemoryCheckpoint({}, {EMBEDDING: ("q4_K", random_grid("q4_K", 8, 64))})
    assert choose_formats(checkpoint, "auto") == {EMBEDDING: INT8}


def test_an_unknown_dtype_raises() -> None:
    with pytest.raises(UsageError, match="unknown dtype `fp16`") as caught:
        choose_formats(NANO, "fp16")
    assert caught.value.hint == "the dtypes are auto, float32, int8, int4"


def test_what_the_manifest_calls_it() -> None:
    assert [stored_dtype({}, dtype) for dtype in DTYPES] == ["float32", "float32", "int8", "int4"]
    assert stored_dtype({EMBEDDING: INT8}, "auto") == "kept"


def test_activations() -> None:
    assert [default_activations(dtype) for dtype in DTYPES] == ["int16", "int16", "int16", "int8"]


@pytest.mark.parametrize(("dtype", "form"), [("int8", TRT_INT8), ("int4", TRT_INT4), ("fp8", TRT_FP8)])
def test_tensorrt_quantises_the_decoders_linears(dtype: TrtDtype, form: BlockFormat) -> None:
    decoder = {name for name in NANO.names() if is_linear(name) and name.startswith("decoder.")}
    assert trt_formats(NANO.names(), dtype) == dict.fromkeys(decoder, form)
    table = {EMBEDDING} if dtype == "int4" else set()
    assert trt_formats(NANO.names(), dtype, "constant") == dict.fromkeys(decoder | table, form)


def test_tensorrt_in_bfloat16_quantises_nothing() -> None:
    assert trt_formats(NANO.names(), "bfloat16") == trt_formats(NANO.names(), "auto") == {}


def test_tensorrt_has_dtypes_of_its_own() -> None:
    with pytest.raises(UsageError, match="unknown dtype `float32`") as caught:
        trt_formats(NANO.names(), "float32")  # type: ignore[arg-type]
    assert all(dtype in str(caught.value.hint) for dtype in TRT_DTYPES)
