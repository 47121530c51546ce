"""The command line ``gemma3c``. Data goes to stdout; progress, notes and errors to stderr.

Each command is a module of its own that is imported when it is called, so that ``gemma3c --help`` does not
pay for torch or onnxruntime.
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from gemma3_compile.cli.group import Settings, gemma3c
from gemma3_compile.cli.reports import exit_code_of


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs ``gemma3c`` and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    signal.signal(signal.SIGTERM, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character shows a question mark
        sys.stdout.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs ``gemma3c`` with ``arguments``, prints any error in two lines, and gives the exit code."""
    settings = Settings()
    try:
        result = gemma3c.main(list(arguments), prog_name="gemma3c", standalone_mode=False, obj=settings)
    except Exception as error:  # the one place where every error ends
        if settings.debug:
            raise
        return exit_code_of(error)
    except KeyboardInterrupt as error:
        return exit_code_of(error)
    return result if isinstance(result, int) else 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM leaves like an interrupt does, so that nothing half written stays."""
    raise SystemExit(128 + number)
