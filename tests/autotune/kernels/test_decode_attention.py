"""What both decode kernels do with any cache: splits, sequences of their own lengths, idle ones, unwritten slots."""

from __future__ import annotations

import pytest
import torch

from autotune.correctness import compare
from autotune.gpu import GPUS
from autotune.kernel import Case, Config, Kernel, Tensors
from autotune.kernels.global_decode import GlobalDecode, global_decode
from autotune.kernels.qk_norm_rope_cache import QkNormRopeCache
from autotune.kernels.window_decode import WindowDecode
from autotune.launch import Launch
from runtimes.errors import UsageError
from tests.autotune.checked import DEVICE, check_kernel

KERNELS = (WindowDecode(), GlobalDecode())


def case(*, batch: int = 1, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, slots: int = 48, keys: int = 37) -> Case:  # fmt: skip
    dims = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "slots": slots, "keys": keys}
    return Case(dtype="bfloat16", dims=dims | {"scale_dim": 24})


def config(splits: int, block: int = 16) -> Config:
    return Config(constants={"SPLITS": splits, "BLOCK_K": block, "DEPENDENT": 1}, num_warps=4, num_stages=2)


def ragged(kernel: Kernel, chosen: Case, positions: list[int]) -> Tensors:
    """Inputs whose sequences stand at their own positions, with NaN in every slot past them."""
    inputs = kernel.inputs(chosen, device=DEVICE)
    inputs["position"] = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    for sequence, position in enumerate(positions):
        for cache in (inputs["k_cache"], inputs["v_cache"]):
            cache[sequence, :, : position + 1] = cache[sequence, :, : position + 1].nan_to_num(1.0)
            cache[sequence, :, position + 1 :] = float("nan")
    return inputs


def check(kernel: Kernel, chosen: Case, configuration: Config, inputs: Tensors) -> None:
    for comparison in compare(kernel, chosen, configuration, inputs):
        assert comparison.passed, f"{kernel.name}, {chosen}, {configuration}: {comparison}"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    "chosen",
    [
        case(keys=1),
        case(keys=48),
        case(heads=4, kv_heads=1, head_dim=64),
        case(heads=3, kv_heads=1, head_dim=128, keys=17),
        case(batch=2, heads=2, kv_heads=2, head_dim=256, slots=20, keys=19),
    ],
    ids=str,
)
def test_holds_to_its_oracle(kernel: Kernel, chosen: Case) -> None:
    check_kernel(kernel, chosen, config(splits=3))


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 16])
def test_every_number_of_splits(splits: int) -> None:
    """Fewer than blocks, as many, and more."""
    check_kernel(GlobalDecode(), case(keys=41), config(splits))


def test_many_parts_are_joined_in_several_steps() -> None:
    chosen = case(heads=16, kv_heads=1, head_dim=256, slots=160, keys=150)
    narrow = Config(
        constants={"SPLITS": 9, "BLOCK_K": 16, "DEPENDENT": 1}, num_warps=1, num_stages=2
    )  # one part at a time
    check_kernel(GlobalDecode(), chosen, narrow)


def test_each_sequence_has_its_own_length_and_reads_no_slot_past_it() -> None:
    kernel, positions = GlobalDecode(), [0, -1, 47, 15, 16, -1, 31]
    inputs = ragged(kernel, case(batch=7, keys=48), positions)
    check(kernel, case(batch=7, keys=48), config(splits=2), inputs)


@pytest.mark.parametrize("slots", [48, 33])
def test_the_token_s_own_key_stands_apart_wherever_it_lies(slots: int) -> None:
    """The first and last of a block and of the ring, alone in its block (slot 32 of 33), before and after the ring wraps."""
    positions = [1, 15, 16, 17, 32, slots - 1, slots, slots + 15, slots + 16, 2 * slots - 1]
    chosen = case(batch=len(positions), heads=2, kv_heads=1, slots=slots, keys=slots)
    for splits in (1, 3):
        check(WindowDecode(), chosen, config(splits), ragged(WindowDecode(), chosen, positions))


def test_an_idle_sequence_gives_zeros() -> None:
    kernel, chosen = WindowDecode(), case(batch=2)
    inputs = ragged(kernel, chosen, [-1, 5])
    inputs["q"][0] = float("nan")  # means nothing
    out = kernel.run(chosen, config(splits=4), inputs)["out"]
    assert not out[0].any() and out[1].any()


def test_the_counters_are_zero_again() -> None:
    kernel, chosen, chosen_config = GlobalDecode(), case(batch=3, keys=48), config(splits=3)
    inputs = ragged(kernel, chosen, [47, -1, 20])
    outputs = kernel.outputs(chosen, chosen_config, device=DEVICE)
    results = []
    for _ in range(2):
        for launch in kernel.launches(chosen, chosen_config, inputs | outputs):
            launch.run()
        assert not outputs["_zero_arrived"].any()
        results.append(outputs["out"].clone())
    assert torch.equal(*results)


def test_a_launch_is_dependent_where_the_gpu_can() -> None:
    kernel, chosen = WindowDecode(), case()
    tensors = kernel.inputs(chosen, device="meta")
    for card, dependent in (("h100", 1), ("b200", 1), ("a100", 0), ("rtx4090", 0)):
        default = kernel.default(chosen, GPUS[card])
        assert default.constants["DEPENDENT"] == dependent
        tensors |= kernel.outputs(chosen, default, device="meta")
        (launch,) = kernel.launches(chosen, default, tensors)
        assert launch.dependent == bool(dependent)
        other = Config(constants={**default.constants, "DEPENDENT": 1 - dependent}, num_warps=4, num_stages=3)
        assert kernel.refusal(chosen, other, GPUS[card]) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_launch_that_begins_early_sees_what_the_one_before_it_writes(kernel: Kernel) -> None:
    """Two steps over one cache and one workspace, each writing q and the newest row just before its attention."""
    rope, heads = QkNormRopeCache(), {"batch": 4, "heads": 16, "kv_heads": 8, "head_dim": 256, "slots": 1024}
    rope_case, chosen = Case(dtype="bfloat16", dims=heads | {"tokens": 1}), case(**heads, keys=1024)
    inputs = ragged(kernel, chosen, [1500 if kernel.name == "window_decode" else 700, 300, -1, 1023])
    workspace = kernel.outputs(chosen, config(16), device=DEVICE)
    outs = [workspace["out"], torch.empty_like(workspace["out"])]

    def launches(dependent: int) -> list[Launch]:
        rope_config = Config(constants={"BLOCK_HEADS": 1, "DEPENDENT": dependent}, num_warps=1, num_stages=1)
        found: list[Launch] = []
        for seed, (splits, out) in enumerate(zip((16, 7), outs, strict=True)):
            constants = {"SPLITS": splits, "BLOCK_K": 32, "DEPENDENT": dependent}
            tensors = rope.inputs(rope_case, device=DEVICE, seed=seed) | inputs
            found += rope.launches(rope_case, rope_config, tensors | {"start": inputs["position"]})
            chosen_config = Config(constants=constants, num_warps=4, num_stages=3)
            found += kernel.launches(chosen, chosen_config, inputs | workspace | {"out": out})
        return found

    for launch in launches(dependent=0):
        launch.run()
    expected = [out.clone() for out in outs]
    assert not torch.equal(*expected)
    overlapping = launches(dependent=1)
    for launch in overlapping:  # compiles: not to happen while a graph is captured
        launch.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in overlapping * 4:
            launch.run()
    for _ in range(200):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [7, 16, 33])
def test_parts_never_arrive_half_written(splits: int) -> None:
    """A race between the parts and the counter shows as a result that moves; the order of the sums does not."""
    kernel, chosen = GlobalDecode(), case(batch=4, heads=16, kv_heads=8, head_dim=256, slots=4096, keys=4096)
    inputs = ragged(kernel, chosen, [4095, 1023, -1, 511])
    outputs = kernel.outputs(chosen, config(splits, block=32), device=DEVICE)
    launches = kernel.launches(chosen, config(splits, block=32), inputs | outputs)
    results = []
    for _ in range(200):
        outputs["out"].fill_(float("nan"))
        for launch in launches:
            launch.run()
        results.append(outputs["out"].clone())
    assert all(torch.equal(results[0], result) for result in results)
    check(kernel, chosen, config(splits, block=32), inputs)


def test_a_configuration_that_does_not_fit_is_refused_before_it_is_compiled() -> None:
    wide = Config(constants={"SPLITS": 1, "BLOCK_K": 64, "DEPENDENT": 1}, num_warps=4, num_stages=3)
    chosen = case(head_dim=256)
    assert GlobalDecode().refusal(chosen, wide, GPUS["h100"]) is None
    refused = GlobalDecode().refusal(chosen, wide, GPUS["rtx4090"])
    assert refused is not None and "147456 bytes of shared memory" in refused


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_default_fits_every_gpu(kernel: Kernel) -> None:
    for batch in (1, 16):
        chosen = case(batch=batch, heads=16, kv_heads=8, head_dim=256, slots=1024, keys=1024)
        for card in GPUS.values():
            assert kernel.refusal(chosen, kernel.default(chosen, card), card) is None


def test_the_launcher_says_what_does_not_fit() -> None:
    q = torch.zeros(1, 1, 4, 32, dtype=torch.bfloat16, device=DEVICE)
    cache = torch.zeros(1, 2, 16, 32, dtype=torch.bfloat16, device=DEVICE)
    position = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(UsageError, match=r"4 query heads over 3 key-value heads of 32"):
        global_decode(q, cache[:, :1].expand(1, 3, 16, 32).contiguous(), cache, position, scale=1.0)
    with pytest.raises(UsageError, match=r"position must be torch.int32, but is torch.int64"):
        global_decode(q, cache, cache, position.long(), scale=1.0)
    with pytest.raises(UsageError, match=r"v must have the shape \(1, 2, 16, 32\), but has \(1, 2, 8, 32\)"):
        global_decode(q, cache, cache[:, :, :8].contiguous(), position, scale=1.0)
    with pytest.raises(UsageError, match=r"q must be \[B, 1, N, D\]"):
        global_decode(q[0], cache, cache, position, scale=1.0)
