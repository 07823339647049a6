"""The other end of a worker: started, asked run by run, and ended whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastvlm_mlx.errors import FastVLMError, OptionError

WORKER = (sys.executable, "-m", "fastvlm_mlx.bench.worker")
# Lines of what a worker that has died said last.
_LAST = 3


class Process:
    """A process that answers a line for each line that it is sent, one JSON object each."""

    def __init__(
        self,
        name: str,
        job: Mapping[str, Any],
        command: Sequence[str] = WORKER,
        environment: Mapping[str, str] | None = None,
    ):
        """Start it; `wait` says when it is ready.

        Args:
            name: what it measures, for messages.
            job: what it gets as its last argument.
        """
        self.name = name
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, as it lives on
        self._process = subprocess.Popen(
            [*command, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def wait(self) -> dict[str, Any]:
        """What it says when it is ready; raises as `run`."""
        return self._reply()

    def run(self, number: int) -> dict[str, Any]:
        """One run.

        Raises:
            OptionError: what it was asked to measure can't be measured.
            FastVLMError: it has died.
        """
        if self._process.stdin is not None:
            # What one that has died had to say is read below.
            with suppress(BrokenPipeError):
                print(number, file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise FastVLMError(
                f"the process that measured {self.name} has ended with status "
                f"{self._process.wait()} before it was done{self._said()}: see whether memory "
                "was short, or measure less"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise OptionError(reply["error"])
        return reply

    def _said(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()][-_LAST:]
        return f" ({' '.join(lines)})" if lines else ""
