"""The process that cases run in. Reads requests on one pipe and answers on another.

What the product prints, and what C libraries do, goes to a file that is looked at after each case.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import re
import resource
import signal
import stat
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

# On layers this small a second thread gains nothing.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LARGEST_FILE = 500_000_000
# Beyond any case's limit: where the watching parent is late, the machine still survives.
MOST_MEMORY = 8_000_000_000


def main(requests: int, replies: int, stock_directory: str, printed: str, noise: str) -> None:
    from tests.fuzz import judge
    from tests.fuzz.case import RECORD, Case
    from tests.fuzz.stock import Stock

    stock = Stock(Path(stock_directory))
    warmed: set[str] = set()
    opened = _watch_opens(stock.outside)
    with open(requests, encoding="utf-8") as incoming, open(replies, "w") as outgoing:

        def reply(**data: Any) -> None:
            outgoing.write(json.dumps(data) + "\n")
            outgoing.flush()

        for line in incoming:
            request = json.loads(line)
            case = Case(
                request["kind"],
                request["seed"],
                request["number"],
                Path(request["directory"]),
                stock,
            )
            try:
                if case.kind not in warmed:
                    getattr(case.module(), "warm", lambda stock: None)(stock)
                    warmed.add(case.kind)
                if request.get("replay"):
                    record = json.loads((case.directory / RECORD).read_text())
                    case.facts, case.folder = record["facts"], record.get("folder", "")
                else:
                    case.prepare()
                before = _state(case.source)
                os.truncate(printed, 0)
                os.truncate(noise, 0)
                opened.clear()
                reply(event="prepared")
                started, resident = time.perf_counter(), _start_memory()
                case.run()
                seconds, peak = time.perf_counter() - started, _peak_memory()
            except BaseException as error:  # noqa: BLE001 - the campaign's own faults are told
                text = "".join(traceback.format_exception(error))
                reply(
                    event="done",
                    findings=[["CAMPAIGN: " + text.strip().splitlines()[-1][:200], text]],
                    outcomes=[],
                )
                continue
            sys.stdout.flush()
            sys.stderr.flush()
            if opened:
                case.bad("read outside of the case", ", ".join(sorted(opened)))
            if not case.facts.get("changes") and _state(case.source) != before:
                case.bad("source changed", str(case.source))
            _judge_outputs(case, Path(printed).read_bytes(), Path(noise).read_bytes(), judge)
            reply(
                event="done",
                findings=[[finding.cause, finding.detail] for finding in case.findings],
                outcomes=case.outcomes,
                mutator=case.facts.get("mutator"),
                seconds=seconds,
                memory=max(0, peak - resident),
            )


def _judge_outputs(case: Any, printed: bytes, noise: bytes, judge: Any) -> None:
    from tests.fuzz.mutate import MARKED, MARKUP
    from tests.fuzz.stock import SECRET

    text = noise.decode(errors="replace")
    shown = printed.decode(errors="replace")
    if text.strip() and not case.facts.get("prints"):
        line = re.sub(r"0x[0-9a-f]+|[\d.]+", "N", text.strip().splitlines()[0])
        line = re.sub(r"/\S+", "PATH", line)[:120]
        case.findings.append(judge.Finding(f"output of its own: {line}", text[:2000]))
    # Answers are the model's own words; what a command prints about files is ours.
    for line in (text + shown).splitlines():
        if judge.unprintable(line):
            case.bad("unprintable characters in the output", repr(line[:1000]))
            break
    if MARKED in shown and MARKUP not in shown and "\\" not in shown:
        case.bad("markup rendered", shown[:1000])
    written = [finding.detail for finding in case.findings] + [text, shown]
    if SECRET in "".join(written):
        case.bad("secret told", repr("".join(written)[:500]))
    out = case.directory / "out"
    for file in out.rglob("*") if out.is_dir() else ():
        if stat.S_ISREG(file.lstat().st_mode) and SECRET.encode() in file.read_bytes():
            case.bad("secret copied", str(file))


def _state(directory: Path) -> dict[str, Any]:
    """Every entry by name: a hash of files, the target of links, the kind of the rest."""
    found: dict[str, Any] = {}
    for root, folders, files in os.walk(directory):
        for name in sorted((*folders, *files)):
            path = os.path.join(root, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode):
                with open(path, "rb") as file:
                    found[path] = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                found[path] = os.readlink(path) if stat.S_ISLNK(mode) else stat.S_IFMT(mode)
    return found


def _watch_opens(outside: Path) -> set[str]:
    """Names under `outside` that Python opens from now on, links resolved."""
    opened: set[str] = set()
    root = str(outside)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if path.startswith(root):
                opened.add(path)

    sys.addaudithook(hook)
    return opened


def resident(pid: int) -> int:
    """Resident bytes of a process; zero where it has gone, or where they can't be read."""
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):
            return 0
    import subprocess

    found = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return int(found.stdout.strip() or 0) * 1024


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process has used; zero where that can't be read."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _start_memory() -> int:
    """Resident bytes now; the system's record of the most starts anew where it can."""
    if sys.platform == "linux":
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            pass
    return resident(os.getpid())


def _peak_memory() -> int:
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A copy of an endless device ends before the disk is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    faulthandler.enable()
    # How the parent asks where a case hangs.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # As the command line does: PIL's remarks on an image's metadata.
    warnings.filterwarnings("ignore", module="PIL")
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
