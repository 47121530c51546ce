"""Where the weights of plans are, and why."""

from __future__ import annotations

import pytest

from gemma3_compile.checkpoints import open_checkpoint
from gemma3_compile.formats import TrtDtype, trt_formats
from gemma3_compile.targets.trt_weights import builder_bytes, choose_weights, stored_bytes
from graphs.onnx_lowering.context import WeightSource
from runtimes.errors import HostError

GB = 10**9


@pytest.mark.parametrize(
    ("asked", "dtype", "size_gb", "chosen", "why"),
    [
        (None, "bfloat16", 8, "input", "the plans hold none of the weights, which a session uploads once"),
        (
            None,
            "bfloat16",
            8,
            "input",
            "a second copy of the 8.00 GB in the plans, for which the build takes about 18.3 GB",
        ),
        (None, "fp8", 8, "input", "this host has 25.0 GB"),
        (None, "int4", 7, "constant", "TensorRT multiplies by int4 as it is only where it is constant"),
        (None, "int4", 12, "input", "so --dtype int8 or bfloat16 is faster"),
        ("input", "int4", 7, "input", "asked for: "),
        ("constant", "bfloat16", 8, "constant", "asked for: That is a second copy of the 8.00 GB"),
    ],
)
def test_the_choice(asked: WeightSource | None, dtype: TrtDtype, size_gb: int, chosen: str, why: str) -> None:
    source, decision = choose_weights(asked, dtype=dtype, weights_bytes=size_gb * GB, memory_bytes=25 * GB)
    assert (source, decision.choice, decision.name) == (chosen, chosen, "weights")
    assert why in decision.reason


def test_constants_that_do_not_fit() -> None:
    with pytest.raises(HostError, match=r"24.0 GB of weights .* about 51.9 GB .* this host has 25.0 GB") as caught:
        choose_weights("constant", dtype="bfloat16", weights_bytes=24 * GB, memory_bytes=25 * GB)
    assert caught.value.exit_code == 1 and "leave out --weights constant" in str(caught.value.hint)


def test_a_host_that_tells_nothing_is_trusted() -> None:
    source, decision = choose_weights("constant", dtype="auto", weights_bytes=99 * GB, memory_bytes=None)
    assert source == "constant" and "this host" not in decision.reason


def test_inputs_cost_the_builder_nothing() -> None:
    assert (
        builder_bytes("input", "auto", 99 * GB)
        == builder_bytes("input", "auto", 0)
        < builder_bytes("constant", "auto", GB)
    )


@pytest.mark.parametrize(("dtype", "bits"), [("auto", 16.0), ("int4", 4.5), ("fp8", 8.0)])
def test_stored_bytes_of_a_model(dtype: TrtDtype, bits: float) -> None:
    """Within what norms, the embedding and scales make of it."""
    with open_checkpoint(None, size="4b", random_seed=0) as checkpoint:
        names = checkpoint.names()
        formats = trt_formats(names, dtype)
        size = stored_bytes(checkpoint, formats)
        count = dict.fromkeys(names, 1)
        for name in names:
            for dim in checkpoint.info(name).shape:
                count[name] *= dim
    plain = sum(n for name, n in count.items() if name not in formats)
    quantised = sum(n for name, n in count.items() if name in formats)
    assert size == pytest.approx(plain * 2 + quantised * bits / 8, rel=0.002)
