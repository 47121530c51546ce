"""Calibration of the decoder, layer by layer: each linear layer is rounded by what its inputs are.

Legend: B sequences, S tokens in each, T = B S tokens, H hidden, K inputs of a linear layer, N outputs.

Two streams of activations run through the layers side by side. In the first all weights are the
checkpoint's; in the second those before are rounded already. A linear layer w is rounded to q so that
its outputs in the second stream, q x', come close to those of the first, w x:

    sum_t c_t |q x'_t - w x_t|**2  =  sum_t c_t |(q - v) x'_t|**2 + const,
    v = w (1 + D / M),   M = sum_t c_t x'_t x'_t',   D = sum_t c_t (x_t - x'_t) x'_t'

``v`` is what :mod:`gemma3_compile.quantize.output_rounding` rounds. c_t is one, or, where an RMSNorm
follows that divides by the size of the output, one over that size squared.

In memory are one layer's weights and the activations of the calibration tokens, whatever the model's size.

Source: GPTQ (arXiv 2210.17323); the first stream as the goal is GPTAQ's (arXiv 2504.02692), here in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gemma3_compile.blocks import Blocks
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.formats import EMBEDDING
from gemma3_compile.model.decoder import Layer
from gemma3_compile.quantize.output_rounding import DAMPING, SWEEPS, OutputRounding, damped, stacked
from gemma3_compile.quantize.rounding import dequantize, quantize_rtn
from gemma3_compile.quantize.streams import Stream, load_layer
from graphs.weights import BlockFormat
from runtimes.progress import SILENT, Advance, Progress

HEAD_SWEEPS = 2
HEAD_DAMPING = 1.0
"""More than a linear layer's, since the rows of the tied table are also looked up, where all columns count alike."""
_CHUNK_ELEMENTS = 1 << 23
_INPUT_OF = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
"""Linear layers that see the same input as another."""
_BEFORE_A_NORM = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"})
"""Linear layers whose output an RMSNorm divides by its size."""
_SMALLEST_SIZE = 1e-3
"""A token counts as if its output's size, squared, were at least this share of the median."""


def calibrate(
    checkpoint: Checkpoint,
    formats: Mapping[str, BlockFormat],
    token_ids_BS: Tensor,
    progress: Progress = SILENT,
) -> Iterator[tuple[str, Blocks]]:
    """Rounds those of the decoder's weights that ``formats`` names, and yields each by its canonical name.

    Four-bit weights are rounded by their outputs, the embedding by those of the head that it is tied to.
    Eight-bit weights are rounded to nearest. Names outside the decoder are passed over.

    Args:
        token_ids_BS: int64, the calibration text; all sequences of one length, each begun with ``<bos>``.

    Raises:
        CheckpointError: a tensor cannot be read.
        NumericsError: an activation is not finite.
    """
    layers = checkpoint.config.text.num_layers
    tied = formats.get(EMBEDDING)
    passes = 2 if tied is not None and tied.bits == 4 else 1
    with torch.no_grad(), progress.task("calibrating", total=layers * passes) as advance:
        embedding: tuple[Blocks, BlockFormat] | None = None
        if tied is not None:
            moment_KK = _head_moment(checkpoint, token_ids_BS, advance) if tied.bits == 4 else None
            embedding = _round_embedding(checkpoint, tied, moment_KK), tied
            yield EMBEDDING, embedding[0]
        exact, rounded = Stream(checkpoint, token_ids_BS), Stream(checkpoint, token_ids_BS, embedding)
        for index in range(layers):
            prefix = f"decoder.layers.{index}."
            wanted = {n[len(prefix) :]: form for n, form in formats.items() if n.startswith(prefix)}
            for name, blocks in _calibrate_layer(load_layer(checkpoint, index), wanted, exact, rounded).items():
                yield prefix + name, blocks
            advance(1)


def _head_moment(checkpoint: Checkpoint, token_ids_BS: Tensor, advance: Advance) -> Tensor:
    """The sum of x x' over the head's inputs, after a pass through all layers as the checkpoint has them."""
    stream = Stream(checkpoint, token_ids_BS)
    for index in range(checkpoint.config.text.num_layers):
        stream.run(load_layer(checkpoint, index))
        advance(1)
    x_TH = stream.head_inputs_TH()
    return x_TH.T @ x_TH


def _round_embedding(checkpoint: Checkpoint, form: BlockFormat, moment_KK: Tensor | None) -> Blocks:
    """The tied table, some rows at a time."""
    rows, columns = checkpoint.info(EMBEDDING).shape
    rounder = _Rounder(form, moment_KK, HEAD_DAMPING, HEAD_SWEEPS)
    step = max(1, _CHUNK_ELEMENTS // columns)
    chunks = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    return stacked([rounder.round(checkpoint.read_rows(EMBEDDING, *chunk).float()) for chunk in chunks])


def _calibrate_layer(
    layer: Layer, formats: Mapping[str, BlockFormat], exact: Stream, rounded: Stream
) -> dict[str, Blocks]:
    """One layer through both streams; in the second each linear layer is rounded as its input arrives."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    results: dict[str, Blocks] = {}

    def watch(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = inputs[0].flatten(0, 1), output.flatten(0, 1).square().mean(1)

    def replace(name: str, linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        goal_TK, size_T = seen[_INPUT_OF.get(name, name)][0], seen[name][1]
        count_T = _counts(size_T) if name in _BEFORE_A_NORM else torch.ones_like(size_T)
        form = formats[f"{name}.weight"]
        blocks = _round_linear(linear.weight, inputs[0].flatten(0, 1), goal_TK, count_T, form)
        linear.weight = nn.Parameter(_values(blocks, form), requires_grad=False)
        results[f"{name}.weight"] = blocks

    linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    hooks = [m.register_forward_hook(lambda _, x, y, n=n: watch(n, x, y)) for n, m in linears.items()]
    exact.run(layer)
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        if f"{name}.weight" in formats:
            linear.register_forward_pre_hook(lambda m, x, n=name: replace(n, m, x))
    rounded.run(layer)
    return results


def _counts(size_T: Tensor) -> Tensor:
    """What each token's error counts, where the output is divided by its size; the mean is one."""
    count_T = 1.0 / size_T.clamp(min=_SMALLEST_SIZE * float(size_T.median()) + 1e-30)
    return count_T / count_T.mean()


def _round_linear(w_NK: Tensor, x_TK: Tensor, goal_TK: Tensor, count_T: Tensor, form: BlockFormat) -> Blocks:
    """Rounds ``w`` so that its outputs on ``x`` come close to those that ``w`` itself has on ``goal``."""
    if form.bits != 4:
        return _Rounder(form).round(w_NK)
    counted_TK = x_TK * count_T[:, None]
    moment_KK = x_TK.T @ counted_TK
    drift_KK = (goal_TK - x_TK).T @ counted_TK
    shift_NK = torch.linalg.solve(damped(moment_KK), (w_NK @ drift_KK).T).T
    return _Rounder(form, moment_KK).round(w_NK + shift_NK)


class _Rounder:
    """Rounds rows to a format: by their outputs where ``moment_KK`` of the inputs is given, else to nearest."""

    def __init__(
        self, form: BlockFormat, moment_KK: Tensor | None = None, damping: float = DAMPING, sweeps: int = SWEEPS
    ) -> None:
        self.form, self.zero_points = form, form.zero_points == "integer"
        self.by_outputs: OutputRounding | None = None
        if moment_KK is not None:
            self.by_outputs = OutputRounding(
                moment_KK,
                bits=form.bits,
                block_size=form.block_size,
                zero_points=self.zero_points,
                damping=damping,
                sweeps=sweeps,
            )

    def round(self, w_NK: Tensor) -> Blocks:
        """The rows' codes, scales and zero points."""
        if self.by_outputs is not None:
            return self.by_outputs.round(w_NK)
        codes, scales, zeros = quantize_rtn(w_NK, self.form.bits, self.form.block_size, self.zero_points)
        return Blocks(codes=codes, scales=scales, zeros=zeros)


def _values(blocks: Blocks, form: BlockFormat) -> Tensor:
    """The weights that blocks stand for, fp32 [N, K]."""
    return dequantize(blocks.codes, blocks.scales, blocks.zeros, form.bits, form.block_size)
