"""Sampling: the oracle against the runtime's sampler, the kernels against the oracle, token for token."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autotune.kernel import Case, Config, Tensors
from autotune.kernels.sample import Sample, option_tensors, sample, sample_oracle, weights_of
from runtimes.errors import UsageError
from runtimes.sampling import Sampler, SamplingOptions
from tests.autotune.checked import DEVICE, H100, check_kernel

KERNEL = Sample()
SMALL = Config(
    constants={"GROUP": 16, "BLOCK": 128, "CHUNK": 128, "SEARCH": 32, "PIVOTS": 8, "DEPENDENT": 0},
    num_warps=4,
    num_stages=1,
)
"""Every loop turns several times on a few hundred logits, and a row takes several programs."""
LARGE = KERNEL.default(Case(dtype="float32", dims={}), H100)

GREEDY = SamplingOptions()
OPTIONS = [
    GREEDY,
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.3),
    SamplingOptions(temperature=1.0, top_k=1),
    SamplingOptions(temperature=1.0, top_k=5),
    SamplingOptions.recommended(),
    SamplingOptions(temperature=1.5, top_k=150),
    SamplingOptions(temperature=1.0, top_k=5000, top_p=0.7),
    SamplingOptions(temperature=0.6, top_p=0.9),
    SamplingOptions(temperature=1.7, top_p=0.999),
    SamplingOptions(temperature=1.0, top_p=0.02),
    SamplingOptions(temperature=1.0, min_p=0.05),
    SamplingOptions(temperature=1.0, min_p=1.0),
    SamplingOptions(temperature=0.8, top_k=50, top_p=0.8, min_p=0.2),
    SamplingOptions(temperature=2.0, top_p=0.9, min_p=0.1),
]


def logits_of(seed: int, rows: int, vocab: int, *, ties: bool = False) -> torch.Tensor:
    """With ``ties`` a bf16 head's: hundreds of logits share a value."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits * 2).round() / 2 if ties else logits


def uniforms(seed: int, rows: int) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def runtime_token(logits: torch.Tensor, options: SamplingOptions, uniform: float, seen: list[int]) -> int:
    sampler = Sampler(options, len(logits), seen)
    sampler.__dict__["_random"] = SimpleNamespace(random=lambda: uniform)
    return sampler.pick(np.asarray(logits.numpy()))


@pytest.mark.parametrize("ties", [False, True])
def test_the_oracle_is_the_runtimes_sampler(ties: bool) -> None:
    vocab, seen = 1003, [3, 500, 77]
    options = [*OPTIONS, SamplingOptions(temperature=0.9, top_k=40, repetition_penalty=1.3)]
    for seed in range(20):
        logits, uniform = logits_of(seed, len(options), vocab, ties=ties), uniforms(seed, len(options))
        seen_BV = torch.zeros(len(options), vocab, dtype=torch.uint8)
        seen_BV[:, seen] = 1
        expected = [
            runtime_token(logits[i], o, float(uniform[i]), seen if o.repetition_penalty != 1 else [])
            for i, o in enumerate(options)
        ]
        assert sample_oracle(logits, option_tensors(options, "cpu"), uniform, seen_BV).tolist() == expected


def test_weights_are_exponentials_and_never_rise() -> None:
    logits = torch.linspace(5, -60, 300_001)
    for temperature in (0.02, 1.0, 3.7):
        weights = weights_of(logits, temperature)
        exact = ((logits.double() - 5) / temperature).exp() * 2**40
        assert int(weights[0]) == 2**40
        assert bool((weights.diff() <= 0).all())
        # fp32 rounds the logarithm, of up to 29 natural units, to 2**-24 of itself; then an integer is cut off.
        assert bool(((weights - exact).abs() <= 4e-6 * exact + 1).all())
    near = torch.arange(2**16, dtype=torch.float32) * -(2.0**-16) / torch.tensor(1.4426950408889634)
    assert bool((weights_of(near, 1.0).diff() < 0).all())


def check_tokens(logits: torch.Tensor, options: list[SamplingOptions], uniform: torch.Tensor, config: Config) -> None:
    logits, uniform = logits.to(DEVICE), uniform.to(DEVICE)
    expected = sample_oracle(logits, option_tensors(options, DEVICE), uniform)
    assert sample(logits, options, uniform, config=config).tolist() == expected.tolist()


@pytest.mark.parametrize(("config", "ties"), [(SMALL, False), (SMALL, True), (LARGE, True)])
def test_every_option_gives_the_oracles_token(config: Config, ties: bool) -> None:
    """Top-k 150 and 5000 are more than there are groups."""
    check_tokens(logits_of(1, len(OPTIONS), 203, ties=ties), OPTIONS, uniforms(2, len(OPTIONS)), config)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 129])
def test_small_and_odd_vocabularies(vocab: int) -> None:
    options = [GREEDY, OPTIONS[1], OPTIONS[5], OPTIONS[8]]
    check_tokens(logits_of(vocab, 4, vocab), options, uniforms(vocab, 4), SMALL)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_uniform_numbers(uniform: float) -> None:
    """Where sums round to less than the target, the last token that is kept is drawn, and no other."""
    options = [OPTIONS[1], OPTIONS[4], OPTIONS[9], OPTIONS[11], OPTIONS[13]]
    check_tokens(logits_of(3, 5, 200), options, torch.full((5,), uniform, dtype=torch.float64), SMALL)


@pytest.mark.parametrize("spread", [0.0, 1e-2])
def test_a_flat_row_gives_the_oracles_token_whatever_the_configuration(spread: float) -> None:
    """Thousands of borders between tokens lie close to each other: only exact sums hold them apart. One logit stands
    far from the others, so that borders split nothing, and a list of nearly all of them is left."""
    logits = torch.rand(1, 300, generator=torch.Generator().manual_seed(7)) * spread
    logits[0, 17] = 3.0
    rows = logits.expand(3, -1).contiguous()
    options = [SamplingOptions(temperature=2.0, top_p=0.97)] * 2 + [SamplingOptions(temperature=2.0, min_p=0.01)]
    wide = replace(SMALL, constants=dict(SMALL.constants) | {"BLOCK": 256, "SEARCH": 64, "PIVOTS": 16, "GROUP": 32})
    for config in (SMALL, wide):
        check_tokens(rows, options, torch.tensor([0.1234, 0.98, 0.77], dtype=torch.float64), config)


def test_what_has_to_be_zero_is_zero_again() -> None:
    case = Case(dtype="float32", dims=dims(2, 300, top_p=90))
    tensors = KERNEL.inputs(case, device=DEVICE) | KERNEL.outputs(case, SMALL, device=DEVICE)
    tokens = []
    for _ in range(2):
        for launch in KERNEL.launches(case, SMALL, tensors):
            launch.run()
        assert not any(tensor.any() for name, tensor in tensors.items() if name.startswith("_zero"))
        tokens.append(tensors["token"].tolist())
    assert tokens[0] == tokens[1]


def test_equal_logits_and_both_zeros_are_ties() -> None:
    zeros = torch.zeros(4, 100)
    zeros[:, ::2] = -0.0
    half = SamplingOptions(temperature=1.0, top_p=0.5)
    options = [GREEDY, half, half, SamplingOptions(temperature=1.0, top_k=3)]
    uniform = torch.tensor([0.5, 0.999, 0.0, 0.999], dtype=torch.float64)
    assert sample(zeros.to(DEVICE), options, uniform.to(DEVICE), config=SMALL).tolist() == [0, 49, 0, 99]


def test_top_p_stops_where_the_sum_is_reached() -> None:
    logits = torch.tensor([0.0, 1.0, 0.0], device=DEVICE) * float(np.log(2))
    almost_one = torch.full((1,), 1 - 2**-53, dtype=torch.float64, device=DEVICE)
    for top_p, expected in ((0.49, 1), (0.51, 0), (0.74, 0), (0.76, 2)):
        options = [SamplingOptions(temperature=1.0, top_p=top_p)]
        assert int(sample(logits[None], options, almost_one, config=SMALL)) == expected


def test_greedy_takes_the_lowest_of_the_largest() -> None:
    logits = torch.full((2, 300), -1.0)
    logits[0, [299, 170, 35]] = 2.0
    token = sample(logits.to(DEVICE), [GREEDY] * 2, torch.zeros(2, dtype=torch.float64, device=DEVICE), config=SMALL)
    assert token.tolist() == [35, 0]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gives_no_token(value: float) -> None:
    logits = logits_of(0, 3, 100)
    logits[1, 63] = value
    options = [GREEDY, GREEDY, OPTIONS[5]]
    token = sample(logits.to(DEVICE), options, uniforms(0, 3).to(DEVICE), config=SMALL)
    assert token.tolist()[1] == -1
    assert min(token.tolist()[::2]) >= 0


def test_the_penalty_counts_what_was_said_and_marks_what_is_said() -> None:
    logits = torch.full((1, 40), -1.0, device=DEVICE)
    logits[0, :4] = torch.tensor([4.0, 3.9, 3.8, 3.7])
    seen = torch.zeros(1, 40, dtype=torch.uint8, device=DEVICE)
    seen[0, 0] = 1
    uniform = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    options = [SamplingOptions(repetition_penalty=2.0)]
    assert [int(sample(logits, options, uniform, seen, config=SMALL)) for _ in range(4)] == [1, 2, 3, 0]
    assert seen.nonzero()[:, 1].tolist() == [0, 1, 2, 3]


def dims(rows: int, vocab: int, **options: int) -> dict[str, int]:
    plain = {"temperature": 100, "top_k": 0, "top_p": 100, "min_p": 0, "penalty": 100}
    return {"rows": rows, "vocab": vocab, **plain, **options}


def check_exactly(case: Case, seed: int) -> None:
    inputs = KERNEL.inputs(case, device=DEVICE, seed=seed)
    expected: Tensors = KERNEL.oracle(case, inputs)
    assert KERNEL.run(case, KERNEL.default(case, H100), inputs)["token"].tolist() == expected["token"].tolist()


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 64, "top_p": 95, "penalty": 115}, {"top_p": 90}], ids=str
)
def test_holds_to_its_oracle(options: dict[str, int]) -> None:
    case = Case(dtype="float32", dims=dims(3, 1000, **options))
    check_kernel(KERNEL, case)
    check_exactly(case, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [262_144, 262_208])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0}, {}, {"top_k": 64, "top_p": 95}, {"top_k": 64, "top_p": 95, "penalty": 115},
        {"top_k": 5000}, {"top_p": 90}, {"top_p": 99, "temperature": 200}, {"min_p": 5}, {"top_k": 300_000},
    ],
    ids=str,
)  # fmt: skip
def test_real_shapes(vocab: int, options: dict[str, int]) -> None:
    case = Case(dtype="float32", dims=dims(16, vocab, **options))
    check_kernel(KERNEL, case)
    for seed in range(1, 5):
        check_exactly(case, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
def test_a_flat_distribution_holds_to_its_oracle_draw_by_draw(seed: int) -> None:
    """A quarter of a million tokens, none of more than a few millionths of the mass: 64 draws of one row."""
    case = Case(dtype="float32", dims=dims(1, 262_144, top_p=99, temperature=200))
    logits = KERNEL.inputs(case, device=DEVICE, seed=seed)["logits"].expand(64, -1).contiguous()
    check_tokens(logits, [SamplingOptions(temperature=2.0, top_p=0.99)] * 64, uniforms(seed, 64), LARGE)


@pytest.mark.gpu
@pytest.mark.parametrize("ties", [False, True])
def test_every_option_at_the_real_vocabulary(ties: bool) -> None:
    check_tokens(logits_of(4, len(OPTIONS), 262_208, ties=ties), OPTIONS, uniforms(5, len(OPTIONS)), LARGE)


def test_the_launcher_says_what_does_not_fit() -> None:
    logits, uniform = torch.zeros(2, 10, device=DEVICE), torch.zeros(2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(UsageError, match="options for each of 2 rows of logits, but got 1"):
        sample(logits, [GREEDY], uniform)
    with pytest.raises(UsageError, match=r"uniform must be torch.float64, but is torch.float32"):
        sample(logits, [GREEDY] * 2, uniform.float())
    with pytest.raises(UsageError, match=r"logits must be torch.float32, but is torch.bfloat16"):
        sample(logits.bfloat16(), [GREEDY] * 2, uniform)
    with pytest.raises(UsageError, match="rows of up to 4194304 logits, but got 5000000"):
        sample(torch.zeros(2, 5_000_000, device=DEVICE), [GREEDY] * 2, uniform)
    with pytest.raises(UsageError, match="a repetition penalty needs `seen`"):
        sample(logits, [SamplingOptions(repetition_penalty=1.1)] * 2, uniform)
