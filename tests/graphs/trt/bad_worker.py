"""Stands in for the process that builds a plan, and goes wrong as the file ``goes_wrong`` says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    for number in range(9):
        sys.stdout.write(f"line {number} of TensorRT\n")
    sys.stdout.flush()
    request = json.loads((Path(sys.argv[1]) / "request.json").read_text())
    Path(request["plan"]).write_bytes(b"half a plan")
    Path("pid").write_text(str(os.getpid()))
    match Path("goes_wrong").read_text():
        case "abort":
            os.abort()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "exit":
            sys.exit(7)
