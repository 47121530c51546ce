"""The one family of errors that gemma3c raises on purpose.

Every error says what happened, where, what was expected and what came; ``hint`` says what to do
about it. The command line prints the two lines and exits with ``exit_code``; nothing here ever
reaches a user as a traceback.
"""

from __future__ import annotations


class Gemma3CompileError(Exception):
    """Root of all errors raised by gemma3c.

    Args:
        message: what happened, where, what was expected and what came.
        hint: what the reader can do about it, in one line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(Gemma3CompileError):
    """The request itself cannot be met: unknown target, contradicting options, empty prompt."""

    exit_code = 2


class ConfigError(Gemma3CompileError):
    """A model configuration is missing a field or contradicts itself."""


class CheckpointError(Gemma3CompileError):
    """A checkpoint is missing, damaged, of another size, or in a form that is refused."""


class BundleError(Gemma3CompileError):
    """A bundle is missing, damaged, too new, or unsafe to load."""


class TokenizerError(Gemma3CompileError):
    """A tokenizer file cannot be read or lacks a piece that Gemma needs."""


class ImageError(Gemma3CompileError):
    """A picture cannot be read or has a size that is refused."""


class HostError(Gemma3CompileError):
    """This host lacks a package, a provider or a device that the request needs."""


class ContextError(Gemma3CompileError):
    """A prompt and what is to be generated do not fit the caches."""


class NumericsError(Gemma3CompileError):
    """Numbers left their range: NaN or infinite logits, or a stage beyond its tolerance."""


class ExportError(Gemma3CompileError):
    """A stage could not be exported, or a pass or lowering met a node it does not know."""
