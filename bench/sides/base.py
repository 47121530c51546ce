"""What a side does: load, take a prompt from nothing, take one greedy token after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


class Side(ABC):
    """A loaded model on ``threads`` threads, with room for ``context`` tokens."""

    def __init__(self, path: Path, *, threads: int, context: int) -> None:
        self.threads, self.context = threads, context
        self.load(path)

    @abstractmethod
    def load(self, path: Path) -> None:
        """Loads the model; not timed."""

    @abstractmethod
    def prompt(self, tokens: Tokens) -> None:
        """Forgets everything and takes ``tokens``, up to the choice of the next token."""

    @abstractmethod
    def advance(self) -> None:
        """Feeds the token that was chosen last, and chooses the next: the one with the largest logit."""
