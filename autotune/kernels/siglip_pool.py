"""SigLIP pooling: patches averaged in squares, then RMSNorm, in fp32.

Legend: N images, P patches (a square of side p), T tokens (a square of side p / pool), H hidden.

    y = rms_norm(mean over the pool x pool square of x) * scale

Source: Gemma 3 report (arXiv 2503.19786), section 2.1; transformers' ``Gemma3MultiModalProjector``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def siglip_pool(x_NPH: Tensor, scale_H: Tensor, pool: int, eps: float) -> Tensor:
    """The torch oracle: [N, P, H] to [N, T, H]; ``scale_H`` is the whole factor, 1 + w."""
    images, patches, hidden = x_NPH.shape
    side = round(patches**0.5)
    x_NHpp = x_NPH.transpose(1, 2).reshape(images, hidden, side, side)
    x_NTH = F.avg_pool2d(x_NHpp, kernel_size=pool, stride=pool).flatten(2).transpose(1, 2)
    return F.rms_norm(x_NTH.float(), (hidden,), scale_H.float(), eps).to(x_NPH.dtype)
