"""What every target's session does: chunks and steps over caches. The generation above knows only this.

Legend: B batch, S tokens in a chunk, R rows of logits, V vocabulary, H hidden, M image feature rows,
N pictures, T tokens a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import ContextError, UsageError
from runtimes.progress import SILENT, Progress

if TYPE_CHECKING:
    from runtimes.bundle import Bundle
    from runtimes.manifest import Manifest

Provider = Literal["auto", "cpu", "cuda"]
Rows = Literal["last", "all"] | None
"""Which rows of a chunk to return logits for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """A run of one sequence's tokens that goes through the decoder at once; it never cuts a picture.

    Args:
        token_ids: int64 [S].
        features: float32 [M, H], rows of the pictures in this chunk, or None in a chunk of text.
        feature_rows: int64 [S], which row of ``features`` stands at a token, -1 for text.
        image_ids: int64 [S], which picture a token belongs to, -1 for text.
    """

    token_ids: NDArray[np.int64]
    features: NDArray[np.float32] | None = None
    feature_rows: NDArray[np.int64] | None = None
    image_ids: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        given = [part is not None for part in (self.features, self.feature_rows, self.image_ids)]
        assert all(given) or not any(given), "a chunk with a picture has all of features, feature_rows, image_ids"
        assert self.token_ids.ndim == 1 and len(self.token_ids) > 0, self.token_ids.shape
        for part in (self.feature_rows, self.image_ids):
            assert part is None or part.shape == self.token_ids.shape, part.shape

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def has_image(self) -> bool:
        """Whether the chunk holds tokens of a picture."""
        return self.features is not None


class Caches:
    """Keys and values of a batch of sequences; a target's session subclasses it with its buffers.

    Attributes:
        lengths: int64 [B], how many tokens each sequence holds.
        context: how many tokens a sequence can hold.
        bytes_allocated: what the buffers take, local layers' windows included.
    """

    def __init__(self, *, batch: int, context: int, bytes_allocated: int) -> None:
        self.lengths: NDArray[np.int64] = np.zeros(batch, dtype=np.int64)
        self.context = context
        self.bytes_allocated = bytes_allocated

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.lengths)

    def require_room(self, sequence: int, tokens: int) -> None:
        """Raises ContextError if ``sequence`` cannot take ``tokens`` more."""
        held = int(self.lengths[sequence])
        if held + tokens > self.context:
            raise ContextError(
                f"sequence {sequence} holds {held} tokens and {tokens} more make {held + tokens}, "
                f"but its caches were opened for a context of {self.context}",
                hint="open the caches for a longer context, or send less",
            )


class Session(ABC):
    """A loaded bundle on one device. Two threads may use it at once, but not with the same caches."""

    manifest: Manifest
    provider: str
    """Where it runs: ``cpu`` or ``cuda``."""

    @property
    def max_context(self) -> int:
        """The most tokens that caches can be opened for: what the model was made for, or fewer where a build fixed it."""
        longest = self.manifest.model.max_context
        return min(longest, int(self.manifest.settings.get("max_context", longest)))

    @abstractmethod
    def open_caches(self, batch: int, context: int) -> Caches:
        """Empty caches for ``batch`` sequences of up to ``context`` tokens.

        Raises:
            ContextError: ``context`` is more than the model was trained for.
        """

    @abstractmethod
    def grow_caches(self, caches: Caches, context: int) -> bool:
        """Makes room for ``context`` tokens a sequence, keeping what the caches hold.

        Returns:
            False if this device cannot: open new caches and feed the tokens again.

        Raises:
            ContextError: ``context`` is more than the model was trained for.
        """

    @abstractmethod
    def extend(self, caches: Caches, sequence: int, chunk: Chunk, rows: Rows = "last") -> NDArray[np.float32] | None:
        """Adds a chunk to one sequence (prefill).

        Returns:
            logits [R, V] of the last token (R = 1), of all tokens (R = S), or None if ``rows`` is None.

        Raises:
            ContextError: the chunk does not fit the caches.
        """

    @abstractmethod
    def step(
        self, caches: Caches, token_ids: NDArray[np.int64], active: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        """Adds one token to every active sequence (decode), each at its own position.

        Args:
            caches: of B sequences.
            token_ids: int64 [B]; what stands at an idle sequence is ignored.
            active: bool [B]; None means all. An idle sequence's cache and length stay as they are.

        Returns:
            logits [B, V], in a buffer that the next step overwrites; an idle sequence's row means nothing.

        Raises:
            ContextError: an active sequence is full.
        """

    @abstractmethod
    def encode_images(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pictures [N, 3, size, size], normalised, to feature rows [N * T, H].

        Raises:
            UsageError: the bundle has no vision stage.
        """

    def close(self) -> None:
        """Lets go of the device's memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_context(context: int, max_context: int) -> None:
    """Raises ContextError or UsageError unless ``1 <= context <= max_context``."""
    if context < 1:
        raise UsageError(f"`context >= 1` must hold, but got {context}")
    if context > max_context:
        raise ContextError(
            f"a context of {context} tokens was asked for, but the model was made for at most {max_context}",
            hint="shorten the prompt, or ask for fewer tokens",
        )


def open_session(
    bundle: Bundle, *, provider: Provider = "auto", threads: int | None = None, progress: Progress = SILENT
) -> Session:
    """Loads a bundle's decoder.

    Args:
        provider: ``auto`` takes CUDA where it is there and the bundle's caches suit it.
        threads: of the CPU; None takes the physical cores that this process may use.
        progress: is told of what takes long.

    Raises:
        HostError: a package, provider or device is missing; the hint names the extra to install.
        UsageError: no such provider, or a target that this version cannot run.
        BundleError: a graph or plan cannot be loaded.
        GpuError: the GPU has too little memory.
    """
    if provider not in ("auto", "cpu", "cuda"):
        raise UsageError(f"the provider must be one of auto, cpu, cuda, but got {provider!r}")
    if threads is not None and threads < 1:
        raise UsageError(f"`threads >= 1` must hold, but got {threads}")
    target = bundle.manifest.target
    if target == "ort":
        from runtimes.ort_session import OrtSession

        return OrtSession(bundle, provider=provider, threads=threads)
    if target == "trt":
        from runtimes.trt.session import TrtSession

        return TrtSession(bundle, provider=provider, progress=progress)
    raise UsageError(
        f"{bundle.root} was built for the target {target!r}, but this version runs bundles for 'ort' and 'trt' only",
        hint="build it again with `--target ort` or `--target trt`",
    )
