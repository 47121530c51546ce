"""SigLIP tower, pooling and projection, eager: the oracle of the ``vision`` stage.

Legend: N images, C channels, P patches, A heads, E head size, H hidden of the tower, T tokens an image,
X hidden of the decoder.

Source: SigLIP (arXiv 2303.15343), Gemma 3 report (arXiv 2503.19786) section 2.1, as transformers computes it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma3_compile.config import VisionConfig
from graphs import ops


class VisionAttention(nn.Module):
    """Every patch sees every patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x_NPH: Tensor) -> Tensor:
        heads = (*x_NPH.shape[:2], self.num_heads, -1)
        q, k, v = (proj(x_NPH).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out_NAPE = F.scaled_dot_product_attention(q, k, v)
        out_NPH: Tensor = self.out_proj(out_NAPE.transpose(1, 2).flatten(2))
        return out_NPH


class VisionMLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NPH: Tensor) -> Tensor:
        out_NPH: Tensor = self.fc2(F.gelu(self.fc1(x_NPH), approximate="tanh"))
        return out_NPH


class VisionLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x_NPH: Tensor) -> Tensor:
        x_NPH = x_NPH + self.self_attn(self.layer_norm1(x_NPH))
        x_NPH = x_NPH + self.mlp(self.layer_norm2(x_NPH))
        return x_NPH


class Weight(nn.Module):
    """One tensor under a name of its own; what is done with it stands in :class:`VisionTower`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class VisionTower(nn.Module):
    """Pictures to rows of image features in the decoder's hidden size."""

    def __init__(self, config: VisionConfig, text_hidden_size: int, rms_norm_eps: float) -> None:
        super().__init__()
        self.config, self.rms_norm_eps = config, rms_norm_eps
        hidden, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, hidden, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(config.patches_per_side**2, hidden)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.post_layernorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.soft_emb_norm = Weight(hidden)
        self.input_projection = Weight(hidden, text_hidden_size)

    def encode(self, pixels_NCYX: Tensor) -> Tensor:
        """Normalised pixels [N, 3, size, size] to patch features [N, P, H]."""
        x_NPH: Tensor = self.patch_embedding(pixels_NCYX).flatten(2).transpose(1, 2)
        x_NPH = x_NPH + self.position_embedding.weight
        for layer in self.layers:
            x_NPH = layer(x_NPH)
        x_NPH = self.post_layernorm(x_NPH)
        return x_NPH

    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """Normalised pixels [N, 3, size, size] to image features [N, T, X]."""
        scale_H = 1.0 + self.soft_emb_norm.weight.float()
        pooled_NTH: Tensor = ops.siglip_pool(self.encode(pixels_NCYX), scale_H, self.config.pool, self.rms_norm_eps)
        return pooled_NTH @ self.input_projection.weight
