"""A process that loads a bundle once and is then told when to answer.

    python -m fastvlm_mlx.bench.worker JOB

JOB is one JSON object (`Subject`). Each line of standard input is a run's number, each line of
standard output an object: `ready`, or a run's seconds, or an `error`. It is a process of its own
so that its peak of memory is this bundle's at this setting, and of nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvlm_mlx.errors import FastVLMError


def peak_bytes() -> int:
    """This program's peak of resident memory, or MLX's own peak where a GPU holds more."""
    import mlx.core as mx

    from fastvlm_mlx.language.generate import peak_memory_bytes

    with suppress(OSError):
        # What getrusage says on Linux was inherited from the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return max(int(line.split()[1]) * 1024, mx.get_peak_memory())
    return peak_memory_bytes()


def main() -> None:
    # Who started this decides what an interruption means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "w") as replies:
        # Whatever a library prints is no answer.
        os.dup2(2, 1)

        def say(reply: dict[str, Any]) -> None:
            print(json.dumps(reply), file=replies, flush=True)

        try:
            from fastvlm_mlx.bench.subject import Subject

            subject = Subject(json.loads(sys.argv[1]))
            say({"ready": True})
            for line in sys.stdin:
                run = subject.run(int(line))
                say({**run, "peak_memory_bytes": peak_bytes()})
        except FastVLMError as error:
            say({"error": str(error), "exit_status": error.exit_status})


if __name__ == "__main__":
    main()
