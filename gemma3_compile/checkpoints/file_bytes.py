"""Bytes of a file into memory of our own.

A mapped file would count towards the process's memory for as long as it stays mapped; what is read here is
one tensor's rows and nothing else, and a file that ends too soon is an error instead of a bus error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtimes.errors import CheckpointError


def read_bytes(path: Path, offset: int, count: int) -> npt.NDArray[np.uint8]:
    """``count`` bytes from ``offset`` as a writable array. Raises CheckpointError where the file lacks them."""
    buffer = np.empty(count, dtype=np.uint8)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            read = file.readinto(buffer.data) if count else 0
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: cannot be read ({error.strerror})", hint="the file was moved or its permissions changed"
        ) from error
    if read != count:
        raise CheckpointError(
            f"{path.name}: {count:,} bytes were expected at byte {offset:,}, but the file holds {read:,} of them",
            hint="the file is damaged or still being written: fetch it again",
        )
    return buffer
