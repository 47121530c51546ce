"""What is to be validated, against what, and on which inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtimes.errors import UsageError
from runtimes.session import Provider

Reference = Literal["auto", "bundle"]


@dataclass(frozen=True, kw_only=True)
class ValidateRequest:
    """See the module.

    Args:
        checkpoint, size, random_seed, token, offline, revision: as a build takes them.
        reference: ``bundle`` holds the bundle against its own weights only, whatever it was built from.
        prompt: a text to run besides the cases of our own.
        images: pictures for the vision stage, and for the prompt.
        tokens: the most tokens of a text.
        write_receipt: whether what was found goes into the bundle.

    Raises:
        UsageError: the options contradict each other.
    """

    bundle: Path
    checkpoint: str | Path | None = None
    size: str | None = None
    random_seed: int | None = None
    reference: Reference = "auto"
    prompt: str | None = None
    images: tuple[Path, ...] = ()
    tokens: int | None = None
    provider: Provider = "auto"
    threads: int | None = None
    token: str | None = None
    offline: bool = False
    revision: str | None = None
    write_receipt: bool = True

    def __post_init__(self) -> None:
        named = self.checkpoint is not None or self.random_seed is not None
        if self.checkpoint is not None and self.random_seed is not None:
            raise UsageError("--checkpoint and --random-weights exclude each other", hint="leave one of them out")
        if self.reference == "bundle" and named:
            raise UsageError(
                "--reference bundle takes the bundle's own weights, but a checkpoint was named too",
                hint="leave out --reference, --checkpoint or --random-weights",
            )
        if self.tokens is not None and self.tokens < 2:
            raise UsageError(f"`tokens >= 2` must hold, but got {self.tokens}")
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("the prompt is empty", hint="write some text, or leave it out")
