"""The calibration tokens' way through the decoder, one layer in memory at a time.

Legend: B sequences, S tokens in each, T = B S tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma3_compile.blocks import Blocks
from gemma3_compile.checkpoints import Checkpoint
from gemma3_compile.formats import EMBEDDING
from gemma3_compile.model.decoder import Layer, RMSNorm
from gemma3_compile.quantize.rounding import dequantize
from graphs import ops
from graphs.weights import BlockFormat
from runtimes.errors import NumericsError


def load_layer(checkpoint: Checkpoint, index: int) -> Layer:
    """Layer ``index`` of the eager decoder with the checkpoint's weights in fp32."""
    config = checkpoint.config.text
    with torch.device("meta"):
        layer = Layer(config, config.layer_kinds[index])
    _fill(layer, checkpoint, f"decoder.layers.{index}.")
    return layer


def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        weight = nn.Parameter(checkpoint.read(prefix + name).float(), requires_grad=False)
        setattr(module.get_submodule(owner), leaf, weight)


class Stream:
    """Activations of B sequences, before the layer that comes next.

    Args:
        checkpoint: what the embeddings are read from.
        token_ids_BS: int64, all sequences of one length.
        embedding: the rounded embedding to look tokens up in; None for the checkpoint's own.
    """

    def __init__(
        self, checkpoint: Checkpoint, token_ids_BS: Tensor, embedding: tuple[Blocks, BlockFormat] | None = None
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config.text
        batch, length = token_ids_BS.shape
        self.x_BSH = _look_up(checkpoint, token_ids_BS, embedding) * self.config.embed_scale
        position_BS = torch.arange(length).expand(batch, length)
        self.tables = {
            "local": ops.rotary_table(position_BS, self.config.head_dim, self.config.rope_local_base, 1.0),
            "global": ops.rotary_table(
                position_BS, self.config.head_dim, self.config.rope_global_base, self.config.rope_global_factor
            ),
        }

    def run(self, layer: Layer) -> None:
        """Takes the activations through one layer.

        Raises:
            NumericsError: they are not finite afterwards.
        """
        batch, length, _ = self.x_BSH.shape
        slots = self.config.sliding_window if layer.kind == "local" else length
        cache = self.x_BSH.new_zeros((batch, self.config.num_kv_heads, slots, self.config.head_dim))
        start_B = torch.zeros(batch, dtype=torch.int64)
        self.x_BSH, _ = layer(
            self.x_BSH, self.tables[layer.kind], (cache, cache), start_B, torch.full_like(start_B, length), None
        )
        if not bool(self.x_BSH.isfinite().all()):
            raise NumericsError(
                f"{self.checkpoint.source}: activations of the calibration text are not finite after a {layer.kind} layer",
                hint="the checkpoint's weights are damaged, or not those of its configuration",
            )

    def head_inputs_TH(self) -> Tensor:
        """What the head sees after the last layer."""
        norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        _fill(norm, self.checkpoint, "decoder.norm.")
        normed_BSH: Tensor = norm(self.x_BSH)
        return normed_BSH.flatten(0, 1)


def _look_up(checkpoint: Checkpoint, token_ids_BS: Tensor, embedding: tuple[Blocks, BlockFormat] | None) -> Tensor:
    """Rows of the embedding [B, S, H], fp32; only the rows that occur are read."""
    used_U, row_BS = torch.unique(token_ids_BS, return_inverse=True)
    if embedding is None:
        rows = [checkpoint.read_rows(EMBEDDING, token, token + 1) for token in used_U.tolist()]
        return torch.cat(rows).float()[row_BS]
    blocks, form = embedding
    zeros = None if blocks.zeros is None else blocks.zeros[used_U]
    return dequantize(blocks.codes[used_U], blocks.scales[used_U], zeros, form.bits, form.block_size)[row_BS]
