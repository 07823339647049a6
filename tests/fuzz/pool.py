"""Workers under limits: each case has so many seconds and bytes, and a worker may die of it."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from tests.fuzz.judge import ROOT
from tests.fuzz.stock import Stock
from tests.fuzz.worker import processor_s, resident

# What a worker may keep of earlier cases before it is replaced.
KEPT_BYTES = 1_000_000_000
PREPARATION_S = 180


@dataclass(frozen=True)
class Limits:
    """Of a case: seconds, and bytes beyond what the worker held before it.

    Where the machine is busy with something else, a worker that is still working after so many
    seconds is given as many of processor time, but no more than three times as long.
    """

    seconds: float = 20
    memory: int = 2_000_000_000


@dataclass(frozen=True)
class Request:
    kind: str
    seed: int
    number: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed}-{self.number}"


@dataclass
class Result:
    """How a case ended; `findings` are pairs of a cause and what was seen, empty if it is good."""

    request: Request
    findings: list[tuple[str, str]] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0
    mutator: str | None = None


class _Clock:
    """Tells when a process has had its time."""

    def __init__(self, pid: int, limit_s: float):
        self.pid, self.limit_s = pid, limit_s
        self.started, self.spent = time.monotonic(), processor_s(pid)
        self.looked, self.seen = self.started, self.spent

    def late(self) -> bool:
        now = time.monotonic()
        if now - self.started <= self.limit_s:
            self.looked, self.seen = now, processor_s(self.pid)
            return False
        if now - self.looked < 1:
            return False
        spent = processor_s(self.pid)
        waits, self.looked, self.seen = spent - self.seen < 0.05, now, spent
        over = spent - self.spent > self.limit_s or now - self.started > 3 * self.limit_s
        return waits or over


class Worker:
    """A process that runs cases one after another."""

    def __init__(self, stock: Stock, directory: Path):
        printed, self.noise = directory / "printed", directory / "noise"
        printed.write_text("")
        self.noise.write_text("")
        into, self._requests = os.pipe()
        self._replies, out = os.pipe()
        with printed.open("ab") as output, self.noise.open("ab") as noise:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.fuzz.worker", str(into), str(out)),
                    *(str(stock.directory), str(printed), str(self.noise)),
                ],
                pass_fds=(into, out),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=noise,
                cwd=ROOT,
                env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
            )
        os.close(into)
        os.close(out)
        self._buffer = b""
        self.first_resident = 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._requests)
        os.close(self._replies)

    def run(self, request: Request, directory: Path, limits: Limits, replay: bool) -> Result:
        """Raises nothing: a worker that dies or that has to be killed is a finding."""
        result = Result(request)
        data = {**vars(request), "directory": str(directory), "replay": replay}
        try:
            os.write(self._requests, (json.dumps(data) + "\n").encode())
        except OSError:
            return self._died(result)
        until = time.monotonic() + PREPARATION_S
        base, clock = None, _Clock(self.process.pid, limits.seconds)
        while True:
            reply = self._reply(0.05)
            if reply == {}:
                return self._died(result)
            if reply is not None and reply["event"] == "prepared":
                base, clock = resident(self.process.pid), _Clock(self.process.pid, limits.seconds)
                self.first_resident = self.first_resident or base
            elif reply is not None:
                result.findings = [(cause, detail) for cause, detail in reply["findings"]]
                result.outcomes = reply["outcomes"]
                result.seconds = reply.get("seconds", 0.0)
                result.memory = reply.get("memory", 0)
                result.mutator = reply.get("mutator")
                break
            else:
                used = resident(self.process.pid) - base if base is not None else 0
                result.memory = max(result.memory, used)
                late = time.monotonic() > until if base is None else clock.late()
                if used > limits.memory or late:
                    return self._killed(result, used, base is None, limits)
        if result.memory > limits.memory:
            text = f"{result.memory / 1e9:.1f} GB"
            result.findings.append((f"memory at {result.mutator}", text))
        return result

    def alive(self) -> bool:
        """Whether it may run another case."""
        if self.process.poll() is not None:
            return False
        return resident(self.process.pid) - self.first_resident < KEPT_BYTES

    def _reply(self, seconds: float) -> dict[str, Any] | None:
        """The next reply; None if there is none yet, empty if there will be none."""
        if b"\n" not in self._buffer:
            if not select.select([self._replies], [], [], seconds)[0]:
                return None
            data = os.read(self._replies, 1 << 20)
            if not data:
                return {}
            self._buffer += data
            if b"\n" not in self._buffer:
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _died(self, result: Result) -> Result:
        try:
            status = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        end = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        text = self._noise()
        result.findings.append((f"died of {end} at {_stack(text)}", text))
        return result

    def _killed(self, result: Result, used: int, preparing: bool, limits: Limits) -> Result:
        os.truncate(self.noise, 0)
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        self.process.kill()
        self.process.wait()
        text = self._noise()
        result.seconds = PREPARATION_S if preparing else limits.seconds
        what = "memory" if used > limits.memory else "hang"
        if preparing:
            what = "CAMPAIGN: hang of the preparation"
        detail = f"{used / 1e9:.2f} GB after at most {result.seconds} s\n{text}"
        result.findings.append((f"{what} at {_stack(text)}", detail))
        return result

    def _noise(self) -> str:
        return self.noise.read_bytes()[-6000:].decode(errors="replace")


def _stack(text: str) -> str:
    """The product's innermost frame of what faulthandler wrote."""
    found = re.findall(r'File "([^"]+)", line \d+ in (\S+)', text)
    for file, name in found:
        path = Path(file)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] != "tests":
            return f"{path.relative_to(ROOT)}:{name}"
    return f"{found[0][0]}:{found[0][1]}" if found else "unknown"


def run_all(
    requests: Iterable[Request],
    stock: Stock,
    *,
    jobs: int = 1,
    limits: Limits | None = None,
    keep: Path | None = None,
    replay: Path | None = None,
) -> Iterator[Result]:
    """Run every case, `jobs` at a time; results as they come.

    Args:
        keep: where bad cases are put, the first few of each cause with their files.
        replay: the directory of the one case, its files as they were kept.
    """
    waiting: Queue[Request] = Queue()
    for request in requests:
        waiting.put(request)
    count = waiting.qsize()
    done: Queue[Result] = Queue()
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:

        def work(number: int) -> None:
            home = Path(temporary).resolve() / f"worker-{number}"
            home.mkdir()
            worker = None
            while True:
                try:
                    request = waiting.get_nowait()
                except Empty:
                    break
                worker = worker or Worker(stock, home)
                directory = replay or home / "case"
                result = worker.run(request, directory, limits or Limits(), replay is not None)
                if not worker.alive():
                    worker.close()
                    worker = None
                if result.findings and keep is not None:
                    _keep(result, directory, keep, seen)
                if replay is None:
                    shutil.rmtree(directory, ignore_errors=True)
                done.put(result)
            if worker is not None:
                worker.close()

        threads = [Thread(target=work, args=(number,), daemon=True) for number in range(jobs)]
        for thread in threads:
            thread.start()
        for _ in range(count):
            yield done.get()
        for thread in threads:
            thread.join()


def _keep(result: Result, directory: Path, keep: Path, seen: dict[str, int]) -> None:
    cause = result.findings[0][0]
    seen[cause] = seen.get(cause, 0) + 1
    kept = keep / result.request.name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    if seen[cause] <= 3:
        # `cp` copies pipes and links as what they are.
        command = ["cp", "-R", "-P", f"{directory}/.", str(kept)]
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    else:
        record = {**vars(result.request), "facts": None}
        (kept / "case.json").write_text(json.dumps(record))
    text = "\n\n".join(f"{cause}\n{detail}" for cause, detail in result.findings)
    (kept / "finding.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
