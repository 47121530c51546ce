"""The weights writer: recipes followed row by row, grids kept exactly, each row read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from gemma3_compile import weights_writer
from gemma3_compile.blocks import Blocks, keeps_codes, keeps_grid
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.formats import INT4, INT8, TRT_FP8, TRT_INT4, TRT_INT8
from gemma3_compile.weights_writer import WeightsWriter, ledger
from graphs.weights import BlockFormat, Weight, WeightsPlan
from graphs.weights_file import WeightsFile, WeightsLayout
from runtimes.progress import Advance, Progress
from tests.gemma3_compile.memory_checkpoint import KINDS, MemoryCheckpoint, random_grid
from tests.graphs.unpacking import stored_values, unpacked
from tests.tolerances import check

Q, K, V = (f"decoder.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkv")


def weight(
    *sources: str, shape: tuple[int, ...], form: BlockFormat | None = None, offset: float = 0.0, dtype: str = "float32"
) -> Weight:
    return Weight(sources=sources, shape=shape, dtype=dtype, offset=offset, format=form)


class Counting(Progress):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.done = 0

    @contextmanager
    def task(self, label: str, *, total: int | None = None, unit: str = "steps") -> Iterator[Advance]:
        def advance(amount: int) -> None:
            self.done += amount

        self.total = total
        yield advance


def write(
    folder: Path,
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    calibrated: Mapping[str, Blocks] | None = None,
    progress: Progress | None = None,
) -> dict[str, npt.NDArray[np.generic]]:
    """Writes ``weights`` and reads the file back with the safetensors package."""
    plan = WeightsPlan.merge(one.stored() for one in weights)
    path = folder / "weights.safetensors"
    with WeightsFile(path, WeightsLayout(plan)) as file:
        writer = WeightsWriter(plan=plan, checkpoint=checkpoint, file=file, calibrated=(calibrated or {}).items())
        writer.write(progress or Progress())
    return {
        name: tensor.float().numpy() if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn) else tensor.numpy()
        for name, tensor in load_file(path).items()
    }


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_plain_tensors_with_and_without_an_offset(tmp_path: Path) -> None:
    """The sum is taken in fp32, whatever the checkpoint stores."""
    tensors = {"decoder.norm.weight": floats(64).bfloat16(), "vision.patch_embedding.weight": floats(8, 3, 2, 2)}
    norm = weight("decoder.norm.weight", shape=(64,), offset=1.0)
    patch = weight("vision.patch_embedding.weight", shape=(8, 3, 2, 2))
    found = write(tmp_path, MemoryCheckpoint(tensors), [norm, patch])
    assert np.array_equal(found[norm.name], (tensors[norm.name].float() + 1).numpy())
    assert np.array_equal(found[patch.name], tensors[patch.name].numpy())


def test_bfloat16_is_stored_as_its_bits(tmp_path: Path) -> None:
    tensor = floats(5, 7)
    one = weight("decoder.norm.weight", shape=(5, 7), dtype="bfloat16")
    found = write(tmp_path, MemoryCheckpoint({one.name: tensor}), [one])
    assert np.array_equal(found[one.name], tensor.bfloat16().float().numpy())


def test_stacked_sources_follow_each_other(tmp_path: Path) -> None:
    tensors = {name: floats(rows, 64, seed=rows) for name, rows in ((Q, 40), (K, 16), (V, 24))}
    one = weight(Q, K, V, shape=(80, 64))
    found = write(tmp_path, MemoryCheckpoint(tensors), [one])
    assert np.array_equal(found[one.name], torch.cat([tensors[Q], tensors[K], tensors[V]]).numpy())


@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("columns", [64, 96, 80], ids=["even blocks", "odd blocks", "a block not full"])
def test_rounding_errs_by_half_a_step_at_most(tmp_path: Path, form: BlockFormat, columns: int) -> None:
    """But for the outermost codes, where the search for a scale may clip."""
    tensor = floats(24, columns)
    one = weight(Q, shape=(24, columns), form=form)
    found = write(tmp_path, MemoryCheckpoint({Q: tensor}), [one])
    steps = np.repeat(found[f"{Q}.scales"], form.block_size, axis=1)[:, :columns]
    errors = np.abs(stored_values(found, one) - tensor.numpy())
    codes = unpacked(found[f"{Q}.codes"], form.bits, columns)
    inner = (codes > 0) & (codes < (1 << form.bits) - 1)
    assert inner.mean() > 0.8
    assert (errors <= 0.5001 * steps)[inner].all()
    assert errors.max() > 0.4 * steps.min(), "nothing was rounded"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_grid_is_exact(tmp_path: Path, kind: str) -> None:
    """The weights of the file are the checkpoint's, to the bit; with minimums to a rounding of the minimum."""
    info = KINDS[kind]
    form = BlockFormat(
        bits=4 if info.bits == 4 else 8,
        block_size=info.block_size,
        zero_points="none" if info.integer_zero else "minimum",
    )
    checkpoint = MemoryCheckpoint({}, {Q: (kind, random_grid(kind, 24, 96))})
    one = weight(Q, shape=(24, 96), form=form)
    found = write(tmp_path, checkpoint, [one])
    assert keeps_grid(checkpoint, Q, form)
    check(
        "quantised.kept" if info.integer_zero else "quantised.kept_minimum",
        stored_values(found, one),
        checkpoint.tensors[Q],
    )


def test_a_grid_that_the_format_does_not_hold_is_rounded(tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint({}, {Q: ("q4_K", random_grid("q4_K", 24, 96))})
    assert not keeps_grid(checkpoint, Q, INT8) and not keeps_grid(checkpoint, Q, INT4)
    one = weight(Q, shape=(24, 96), form=INT8)
    values = stored_values(write(tmp_path, checkpoint, [one]), one)
    error = np.abs(values - checkpoint.tensors[Q].numpy()).max()
    assert 0 < error < np.abs(values).max() / 200


@pytest.mark.parametrize(
    ("form", "kept"),
    [
        (BlockFormat(bits=4, block_size=32, zero_points="none"), True),
        (BlockFormat(bits=8, block_size=32, zero_points="none"), True),  # wide enough, and the zero point moves
        (BlockFormat(bits=4, block_size=16, zero_points="none"), False),
        (BlockFormat(bits=4, block_size=32, zero_points="integer"), False),
        (BlockFormat(bits=4, block_size=32, zero_points="minimum"), False),
    ],
)
def test_which_formats_hold_a_q4_0_grid(tmp_path: Path, form: BlockFormat, kept: bool) -> None:
    checkpoint = MemoryCheckpoint({}, {Q: ("q4_0", random_grid("q4_0", 8, 64))})
    assert keeps_grid(checkpoint, Q, form) is kept
    if kept:
        one = weight(Q, shape=(8, 64), form=form)
        check("quantised.kept", stored_values(write(tmp_path, checkpoint, [one]), one), checkpoint.tensors[Q])


def test_a_floats_checkpoint_keeps_no_grid() -> None:
    assert not keeps_grid(MemoryCheckpoint({Q: floats(4, 64)}), Q, INT8)


def test_calibrated_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    """Also in a stack, beside a source that is rounded here."""
    generator = torch.Generator().manual_seed(1)
    blocks = Blocks(
        codes=torch.randint(16, (20, 64), generator=generator, dtype=torch.uint8),
        scales=torch.rand((20, 2), generator=generator),
        zeros=torch.randint(16, (20, 2), generator=generator, dtype=torch.uint8),
    )
    checkpoint = MemoryCheckpoint({Q: floats(20, 64), K: floats(12, 64)})
    one = weight(Q, K, shape=(32, 64), form=INT4)
    values = stored_values(write(tmp_path, checkpoint, [one], {Q: blocks}), one)
    assert blocks.zeros is not None
    expected = (blocks.codes.view(20, 2, 32).float() - blocks.zeros[:, :, None].float()) * blocks.scales[:, :, None]
    assert np.array_equal(values[:20], expected.view(20, 64).numpy())
    assert np.abs(values[20:] - checkpoint.tensors[K].numpy()).max() < 0.3
    assert checkpoint.rows_read[Q] == 0


@pytest.mark.parametrize("elements", [1, 64, 500, 64 * 7])
def test_the_size_of_a_chunk_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """A row at a time at least, and no row twice."""
    grids = {V: ("q6_K", random_grid("q6_K", 24, 64))}
    checkpoint = MemoryCheckpoint({Q: floats(40, 64), "decoder.norm.weight": floats(64)}, grids)
    weights = [
        weight(Q, shape=(40, 64), form=INT4),
        weight(V, shape=(24, 64), form=BlockFormat(bits=8, block_size=16, zero_points="none")),
        weight("decoder.norm.weight", shape=(64,), offset=1.0),
    ]
    whole = write(tmp_path, checkpoint, weights)
    before = dict(checkpoint.rows_read)
    monkeypatch.setattr(weights_writer, "CHUNK_ELEMENTS", elements)
    for name, array in write(tmp_path, checkpoint, weights).items():
        assert np.array_equal(array, whole[name]), name
    assert before == {Q: 40, V: 24, "decoder.norm.weight": 64}, "a row was read more than once"
    assert checkpoint.rows_read == {name: 2 * rows for name, rows in before.items()}


def test_the_bar_counts_every_byte(tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint({Q: floats(40, 96), "decoder.norm.weight": floats(64)})
    weights = [weight(Q, shape=(40, 96), form=INT4), weight("decoder.norm.weight", shape=(64,))]
    progress = Counting()
    write(tmp_path, checkpoint, weights, progress=progress)
    size = WeightsPlan.merge(one.stored() for one in weights).size_bytes
    assert progress.total == progress.done == size


def test_the_ledger_says_what_was_done() -> None:
    grids = {Q: ("q4_K", random_grid("q4_K", 8, 64)), K: ("q4_K", random_grid("q4_K", 4, 64))}
    checkpoint = MemoryCheckpoint({"decoder.norm.weight": floats(64).bfloat16()}, grids)
    kept = BlockFormat(bits=4, block_size=32, zero_points="minimum")
    plan = WeightsPlan.merge(
        one.stored()
        for one in (weight(Q, K, shape=(12, 64), form=kept), weight("decoder.norm.weight", shape=(64,), offset=1.0))
    )
    rows = ledger(plan, checkpoint, lambda source, form: f"how {source.split('.')[-2]}")
    assert [row["name"] for row in rows] == [entry.name for entry in plan.entries]
    by_name = {row["name"]: row for row in rows}
    assert by_name["decoder.norm.weight"] == {
        "name": "decoder.norm.weight",
        "dtype": "float32",
        "shape": [64],
        "sources": [{"name": "decoder.norm.weight", "dtype": "bfloat16"}],
        "steps": ["1 added", "stored as float32"],
    }
    minimums = by_name["decoder.layers.0.self_attn.q_proj+k_proj.weight.minimums"]
    assert minimums["sources"] == [{"name": Q, "dtype": "q4_K"}, {"name": K, "dtype": "q4_K"}]
    assert minimums["steps"] == [
        "rows of the sources stacked",
        "4 bits in blocks of 32: how q_proj; how k_proj",
        "this tensor: one minimum a block, less half the code range times the scale",
    ]


@pytest.mark.parametrize("chunk", [1 << 23, 64 * 7])
@pytest.mark.parametrize("form", [TRT_INT4, TRT_INT8, TRT_FP8], ids=["int4", "int8", "fp8"])
def test_tensorrts_formats_round_as_finely_as_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: BlockFormat, chunk: int
) -> None:
    """Stacked, and in chunks of rows that do not divide them: transposed codes are written a piece a row."""
    monkeypatch.setattr(weights_writer, "CHUNK_ELEMENTS", chunk)
    tensors = {name: floats(rows, 64, seed=rows) for name, rows in ((Q, 40), (K, 16), (V, 24))}
    one = weight(Q, K, V, shape=(80, 64), form=form)
    counting = Counting()
    found = write(tmp_path, MemoryCheckpoint(tensors), [one], progress=counting)
    assert counting.done == counting.total == sum(entry.size_bytes for entry in one.stored())
    whole = torch.cat([tensors[Q], tensors[K], tensors[V]]).numpy()
    errors = np.abs(stored_values(found, one) - whole)
    scales = found[f"{one.name}.scales"].reshape(80, -1)
    steps = np.repeat(scales, 64 // scales.shape[1], axis=1)
    if form is TRT_FP8:  # three bits behind the leading one, and steps of 2**-9 scales next to zero
        steps = np.maximum(np.abs(whole) * 2.0**-3, steps * 2.0**-9)
    inner = np.abs(whole) < (6.5 if form is TRT_INT4 else 1e9) * steps  # the search for an int4 scale may clip
    assert inner.mean() > 0.8 and (errors <= 0.5001 * steps)[inner].all()
    assert (errors / steps).max() > 0.4, "nothing was rounded"


def test_codes_of_a_grid_are_kept_where_scales_are_rounded(tmp_path: Path) -> None:
    """q4_0's codes as they are; its scales, fp16 in the checkpoint, in bfloat16."""
    grid = random_grid("q4_0", 24, 64)
    checkpoint = MemoryCheckpoint({}, {Q: ("q4_0", grid)})
    one = weight(Q, shape=(24, 64), form=TRT_INT4)
    found = write(tmp_path, checkpoint, [one])
    exact = checkpoint.read(Q).float().numpy()
    assert not keeps_grid(checkpoint, Q, TRT_INT4) and keeps_codes(checkpoint, Q, TRT_INT4)
    assert np.abs(stored_values(found, one) - exact).max() <= 2**-8 * np.abs(exact).max()
