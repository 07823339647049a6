"""What the workers of `benchmarks.peers` share: the pipe that they answer on, and their memory.

It knows nothing of this repository: a worker's Python finds it beside the worker.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve(subject: Callable[[dict[str, Any]], Any], packages: tuple[str, ...]) -> None:
    """Make the subject of the job, and answer each line of standard input with a run's figures."""
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        made = subject(json.loads(sys.argv[1]))
        versions = {name: version(name) for name in packages}
        print(json.dumps({"ready": True, "versions": versions}), file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(made.run(int(line))), file=replies, flush=True)
