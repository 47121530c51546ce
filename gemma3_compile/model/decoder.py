"""Gemma 3's text decoder, eager: the oracle of every compiled graph.

Legend: B batch, S tokens in the chunk, H hidden, F feed-forward, N query heads, G key-value heads,
D head_dim, W window, C context, V vocabulary, R rows of logits asked for, M image feature rows.

One forward pass serves uncached prefill, prefill in chunks and decode. Norms and the residual rule
are transformers': a norm computes in fp32 and casts back, the residual stays in the model's dtype.
Source: Gemma 3 report (arXiv 2503.19786).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3_compile.config import LayerKind, TextConfig
from graphs import ops

Cache = tuple[Tensor, Tensor]
"""Keys and values of one layer: [B, G, W, D] for a local layer, [B, G, C, D] for a global one."""


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w), computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), (x.shape[-1],), scale, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with q- and k-norm; local or global by the layer's kind."""

    def __init__(self, config: TextConfig, kind: LayerKind) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * dim, hidden, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(
        self,
        x_BSH: Tensor,
        table: tuple[Tensor, Tensor],
        cache: Cache,
        start_B: Tensor,
        length_B: Tensor,
        image_ids_BS: Tensor | None,
    ) -> tuple[Tensor, Cache]:
        heads = (*x_BSH.shape[:2], -1, self.config.head_dim)
        q_BSND = ops.rotate(self.q_norm(self.q_proj(x_BSH).view(heads)), *table)
        k_BSGD = ops.rotate(self.k_norm(self.k_proj(x_BSH).view(heads)), *table)
        v_BSGD = self.v_proj(x_BSH).view(heads)
        state = (q_BSND, k_BSGD, v_BSGD, *cache, start_B, length_B, image_ids_BS)
        if self.kind == "local":
            out, k, v = ops.sliding_window_attention(*state, self.config.sliding_window, self.config.scale)
        else:
            out, k, v = ops.global_attention(*state, self.config.scale)
        return self.o_proj(out.flatten(2)), (k, v)


class MLP(nn.Module):
    """GeGLU with the tanh form of GELU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        out_BSH: Tensor = self.down_proj(F.gelu(self.gate_proj(x_BSH), approximate="tanh") * self.up_proj(x_BSH))
        return out_BSH


class Layer(nn.Module):
    """Attention and feed-forward, each between a norm before and a norm after."""

    def __init__(self, config: TextConfig, kind: LayerKind) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.kind = kind
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config, kind)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)

    def forward(
        self,
        x_BSH: Tensor,
        table: tuple[Tensor, Tensor],
        cache: Cache,
        start_B: Tensor,
        length_B: Tensor,
        image_ids_BS: Tensor | None,
    ) -> tuple[Tensor, Cache]:
        attended, cache = self.self_attn(self.input_layernorm(x_BSH), table, cache, start_B, length_B, image_ids_BS)
        x_BSH = x_BSH + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x_BSH))
        return x_BSH + self.post_feedforward_layernorm(fed), cache


class Decoder(nn.Module):
    """Token ids, image features and caches to logits and caches."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_kinds)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def empty_caches(self, batch: int, context: int) -> list[Cache]:
        """Zeroed caches: W slots for a local layer, ``context`` for a global one."""
        text, weight = self.config, self.embed_tokens.weight

        def zeros(kind: LayerKind) -> Tensor:
            slots = text.sliding_window if kind == "local" else context
            return weight.new_zeros((batch, text.num_kv_heads, slots, text.head_dim))

        return [(zeros(kind), zeros(kind)) for kind in text.layer_kinds]

    def forward(
        self,
        token_ids_BS: Tensor,
        start_B: Tensor,
        length_B: Tensor,
        rows_BR: Tensor,
        caches: list[Cache],
        features_MH: Tensor | None = None,
        feature_rows_BS: Tensor | None = None,
        image_ids_BS: Tensor | None = None,
    ) -> tuple[Tensor, list[Cache]]:
        """One chunk.

        Args:
            token_ids_BS: int64; padded on the right where sequences are unequal.
            start_B: int64, position of the first token in each sequence.
            length_B: int64, real tokens in each row; 0 leaves that sequence's caches alone.
            rows_BR: int64, which rows of the chunk to give logits for (the last one, as a rule).
            caches: one pair a layer, as :meth:`empty_caches` makes them.
            features_MH: rows of image features, already in the decoder's hidden size.
            feature_rows_BS: int64, which feature row stands at a token, -1 for text.
            image_ids_BS: int64, which image a token belongs to, -1 for text.

        Returns:
            fp32 logits [B, R, V] and the caches after the chunk.
        """
        text = self.config
        scale = torch.tensor(text.embed_scale, dtype=self.embed_tokens.weight.dtype).item()
        x_BSH = self.embed_tokens(token_ids_BS) * scale
        if features_MH is not None and feature_rows_BS is not None:
            image_BSH = features_MH[feature_rows_BS.clamp(min=0)].to(x_BSH.dtype)
            x_BSH = torch.where((feature_rows_BS >= 0)[:, :, None], image_BSH, x_BSH)
        position_BS = start_B[:, None] + torch.arange(token_ids_BS.shape[1], device=token_ids_BS.device)
        tables = {
            "local": ops.rotary_table(position_BS, text.head_dim, text.rope_local_base, 1.0),
            "global": ops.rotary_table(position_BS, text.head_dim, text.rope_global_base, text.rope_global_factor),
        }
        after: list[Cache] = []
        for layer, kind, cache in zip(self.layers, text.layer_kinds, caches, strict=True):
            x_BSH, cache = layer(x_BSH, tables[kind], cache, start_B, length_B, image_ids_BS)
            after.append(cache)
        x_BRH = x_BSH.gather(1, rows_BR[:, :, None].expand(-1, -1, text.hidden_size))
        return F.linear(self.norm(x_BRH), self.embed_tokens.weight).float(), after
