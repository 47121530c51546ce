"""Messages between processes of ours over a pipe: a length of eight bytes, little-endian, and that many bytes of pickle.

Both ends are this package; nothing from outside is ever unpickled.
"""

from __future__ import annotations

import pickle
from typing import IO


def send(stream: IO[bytes], message: object) -> None:
    """Writes one message."""
    data = pickle.dumps(message)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def receive(stream: IO[bytes]) -> object | None:
    """Reads one message; None at the end of the stream, also where it ends in the middle of one."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    length = int.from_bytes(head, "little")
    data = stream.read(length)
    return pickle.loads(data) if len(data) == length else None
