"""Option types: a choice that guesses what was meant, sizes in words, text from stdin."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import click

from runtimes.errors import UsageError


class NearChoice(click.Choice[str]):
    """A choice whose error names the nearest option.

    Args:
        planned: words that are no option yet, and what to say of each.
    """

    def __init__(self, choices: Iterable[str], *, planned: dict[str, str] | None = None) -> None:
        super().__init__(list(choices))
        self.planned = planned or {}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word = str(value).lower()
        if word in self.planned:
            raise UsageError(self.planned[word], hint=f"choose from {', '.join(self.choices)}")
        if word not in self.choices:
            self._fail(word, param, ctx)
        return word

    def _fail(self, word: str, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
        near = difflib.get_close_matches(word, [*self.choices, *self.planned], n=1, cutoff=0.5)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        self.fail(f"expected one of {', '.join(self.choices)}, but got {word!r}{guess}", param, ctx)


def read_prompt(prompt: str | None) -> str:
    """The prompt as given, or all of stdin for ``-`` or where none was given and stdin is no terminal.

    Raises:
        UsageError: it is empty, there is none, or it is not valid UTF-8.
    """
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        text = decode_text(sys.stdin.buffer.read(), where="stdin").removesuffix("\n")
    elif prompt is None:
        raise UsageError("there is no prompt", hint='write it behind the bundle: gemma3c run BUNDLE "Once upon a time"')
    else:
        # What the shell handed over as broken UTF-8 arrives as lone surrogates.
        text = decode_text(prompt.encode("utf-8", "surrogateescape"), where="the prompt")
    if not text.strip():
        raise UsageError("the prompt is empty", hint="write some text, or pipe it in with `-`")
    return text


def decode_text(data: bytes, *, where: str) -> str:
    """``data`` as UTF-8; raises UsageError that names the first wrong byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where} is not valid UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            hint="convert it first, as in: iconv -f LATIN1 -t UTF-8",
        ) from error
