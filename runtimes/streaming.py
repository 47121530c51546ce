"""Token bytes to text that may be shown: whole characters only, and nothing of a stop string.

A token may end in the middle of a character (byte pieces such as ``<0xE2>``), and a stop string may
begin in one token and end in a later one. Both are held back until it is clear what they are.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from runtimes.errors import UsageError


class TextStream:
    """Turns pieces of UTF-8 into text and looks for stop strings.

    Args:
        stop: strings that end the text; the first to be complete wins, and none of it is emitted.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise UsageError("a stop string must not be empty, but got ''", hint="leave `stop` out for no stop strings")
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, piece: bytes) -> str:
        """The text that has become certain with ``piece``; empty after a stop string was met."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """What is still held back, at the end; half a character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        buffer = self._held + text
        begin, found = min(
            ((place, stop) for stop in self._stop if (place := buffer.find(stop)) >= 0), default=(-1, None)
        )
        if found is not None:
            self.stopped_by, self._held = found, ""
            return buffer[:begin]
        keep = self._possible_beginning(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def _possible_beginning(self, buffer: str) -> int:
        """Length of the longest end of ``buffer`` that could be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(buffer)), 0, -1):
            if any(stop.startswith(buffer[-length:]) for stop in self._stop):
                return length
        return 0
