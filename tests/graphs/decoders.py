"""The eager decoder and a lowered one, side by side over the same chunks, each with caches of its own.

Legend: B batch, S tokens in the chunk, R rows of logits, V vocabulary, M image feature rows, H hidden,
G key-value heads, D head_dim, W window, C slots of a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autotune.kernels.cache_layout import Layout, slot_positions_BC
from gemma3_compile.model import Gemma3
from tests.graphs.nano import WINDOW, nano_stage
from tests.graphs.ort import Arrays, run, run_in_place
from tests.tolerances import check, relative_error


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """What a chunk with pictures brings besides its tokens."""

    features_MH: Tensor
    feature_rows_BS: Tensor
    image_ids_BS: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """One call. ``length_B`` tokens of each row are real."""

    token_ids_BS: Tensor
    length_B: Tensor
    rows_BR: Tensor
    images: Images | None = None


def text_chunk(lengths: Sequence[int], *, seed: int = 0, size: int | None = None, rows: int = 1) -> Chunk:
    """Random tokens, as many as the longest of ``lengths`` (or ``size``); logits of the last ``rows`` real tokens."""
    generator = torch.Generator().manual_seed(seed)
    chunk = size or max(1, *lengths)
    length_B = torch.tensor(lengths)
    rows_BR = (length_B[:, None] - 1 - torch.arange(rows)).clamp(min=0)
    token_ids_BS = torch.randint(4, 500, (len(lengths), chunk), generator=generator)
    return Chunk(token_ids_BS=token_ids_BS, length_B=length_B, rows_BR=rows_BR)


def image_chunk(size: int, images_at: Sequence[int], *, seed: int = 0, per_image: int = 4, hidden: int = 64) -> Chunk:
    """One sequence of ``size`` tokens with an image at each of ``images_at``; logits of every row."""
    generator = torch.Generator().manual_seed(seed)
    token_ids_BS = torch.randint(4, 500, (1, size), generator=generator)
    image_ids_BS, feature_rows_BS = torch.full((1, size), -1), torch.full((1, size), -1)
    for image, at in enumerate(images_at):
        assert at + per_image <= size, "a chunk never cuts an image"
        token_ids_BS[0, at : at + per_image] = 511
        image_ids_BS[0, at : at + per_image] = image
        feature_rows_BS[0, at : at + per_image] = image * per_image + torch.arange(per_image)
    features_MH = torch.randn((max(1, len(images_at)) * per_image, hidden), generator=generator)
    return Chunk(
        token_ids_BS=token_ids_BS,
        length_B=torch.tensor([size]),
        rows_BR=torch.arange(size)[None],
        images=Images(features_MH=features_MH, feature_rows_BS=feature_rows_BS, image_ids_BS=image_ids_BS),
    )


class EagerDecoder:
    """The oracle: ring caches."""

    def __init__(self, model: Gemma3, batch: int, context: int) -> None:
        self.decoder = model.decoder
        self.caches = model.decoder.empty_caches(batch, context)
        self.start_B = torch.zeros(batch, dtype=torch.int64)

    def __call__(self, chunk: Chunk) -> Tensor:
        """Logits [B, R, V]."""
        given: tuple[Tensor, ...] = (chunk.token_ids_BS, self.start_B, chunk.length_B, chunk.rows_BR)
        images = chunk.images
        extra = () if images is None else (images.features_MH, images.feature_rows_BS, images.image_ids_BS)
        logits, self.caches = self.decoder(*given, self.caches, *extra)
        self.start_B = self.start_B + chunk.length_B
        return logits


class OrtDecoder:
    """Lowered graphs over caches as a session keeps them. Text goes to ``decoder``, pictures to ``decoder_image``.

    A subclass runs another dialect: it says how local caches lie in ``layout``.

    Args:
        graphs: an ``InferenceSession`` for each stage that the chunks need.
        slots: of a local layer; what it has beyond the window is slack.
        in_place: bind each cache output to its input's buffer.
    """

    layout: Layout = "compact"

    def __init__(
        self, graphs: Mapping[str, Any], batch: int, context: int, *, slots: int = WINDOW, in_place: bool = False
    ) -> None:
        self.graphs, self.in_place = graphs, in_place
        self.start_B = torch.zeros(batch, dtype=torch.int64)
        stage = nano_stage("decoder")
        sizes = {"B": batch, "L": slots, "C": context}
        self.caches: Arrays = {
            spec.name: np.zeros([sizes[d] if isinstance(d, str) else d for d in spec.shape], dtype=spec.dtype)
            for spec in stage.inputs
            if spec.name.startswith("cache.")
        }

    def __call__(self, chunk: Chunk) -> Arrays:
        """All outputs by name."""
        inputs = {
            "token_ids": chunk.token_ids_BS,
            "start": self.start_B,
            "length": chunk.length_B,
            "rows": chunk.rows_BR,
        }
        name, images = "decoder", chunk.images
        if images is not None:
            name = "decoder_image"
            inputs |= {
                "features": images.features_MH,
                "feature_rows": images.feature_rows_BS,
                "image_ids": images.image_ids_BS,
            }
        if self.in_place:
            outputs = run_in_place(self.graphs[name], inputs, self.caches)
        else:
            outputs = run(self.graphs[name], {**inputs, **self.caches})
            self.caches = {cache: outputs[f"{cache}.out"] for cache in self.caches}
        self.start_B = self.start_B + chunk.length_B
        return outputs


def logits_of(outputs: Arrays, chunk: Chunk) -> Tensor:
    """The logits of the sequences that were not idle."""
    logits_BRV = torch.from_numpy(outputs["logits"])
    assert torch.isfinite(logits_BRV).all(), "padding and idle rows must stay finite"
    return logits_BRV[chunk.length_B > 0]


def compare(row: str, eager: EagerDecoder, ours: OrtDecoder, chunks: Sequence[Chunk]) -> None:
    """Feeds both the same chunks; after each one the logits and every cache must agree."""
    for index, chunk in enumerate(chunks):
        where = f"chunk {index} at {eager.start_B.tolist()} + {chunk.length_B.tolist()}"
        expected = eager(chunk)[chunk.length_B > 0]
        check(row, logits_of(ours(chunk), chunk), expected, where)
        for name, cache in ours.caches.items():
            check_cache(row, name, torch.from_numpy(cache), eager, where, ours.layout)


def worst_error(eager: EagerDecoder, ours: OrtDecoder, chunks: Sequence[Chunk]) -> float:
    """The largest relative error of the logits over ``chunks``."""
    errors = []
    for chunk in chunks:
        expected = eager(chunk)[chunk.length_B > 0]
        errors.append(relative_error(logits_of(ours(chunk), chunk), expected))
    return max(errors)


def check_cache(
    row: str, name: str, cache_BGCD: Tensor, eager: EagerDecoder, where: str, layout: Layout = "compact"
) -> None:
    """Every position that a cache should hold, against the eager cache's row for it."""
    _, layer, part = name.split(".")
    kind = eager.decoder.config.layer_kinds[int(layer)]
    expected_BGWD = eager.caches[int(layer)][part == "v"]
    slots, window = cache_BGCD.shape[2], WINDOW
    for sequence, end in enumerate(eager.start_B.tolist()):
        if kind == "global":
            assert torch.isfinite(cache_BGCD).all(), f"{name}: rows beyond the end must stay finite"
            ours, theirs = cache_BGCD[sequence, :, :end], expected_BGWD[sequence, :, :end]
        else:
            position_C = slot_positions_BC(torch.tensor([end]), window, slots, layout)[0]
            visible_C = (position_C >= 0) & (position_C > end - 1 - window)
            assert int(visible_C.sum()) == min(end, window), f"{name}: {where}: a position in the window is gone"
            ours = cache_BGCD[sequence, :, visible_C]
            theirs = expected_BGWD[sequence, :, position_C[visible_C] % window]
        check(row, ours, theirs, f"{name} of sequence {sequence} after {where}")
