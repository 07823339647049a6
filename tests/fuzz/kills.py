"""The last step of an export, disturbed at every call that it makes to the filesystem.

A child publishes a small bundle with every such call counted. Before or after call number N it is
killed or interrupted, or somebody puts a file where the bundle is to be, removes what is there, or
puts a bundle of his own in its place. Then the directory is looked at: the old bundle or the new
one, whole, nothing of anybody else's lost; and after the next run nothing is left behind. Two
publishers at once are one more kind of case.

    python -m tests.fuzz.kills "replace exchange kill before 17"    runs one case, by its name

What a power cut does is not tried: nothing is synced, which makes a case ten times faster.
"""

from __future__ import annotations

import builtins
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fastvlm_mlx.errors import DestinationError
from model_export.destination import renames
from model_export.destination.destination import appearing, check_replaceable, look_at

ROOT = Path(__file__).parents[2]
HOOKED = (
    *("open", "close", "mkdir", "rename", "unlink", "rmdir", "fsync", "fchmod", "write", "pread"),
    *("stat", "lstat", "fstat", "listdir", "scandir"),
)
DONE, TOLD, INTERRUPTED, BROKEN = 0, 3, 4, 5
INTRUDERS = ("file", "removal", "bundle", "document")
PRECIOUS = "precious"
FILES = ("config.json", "processor_config.json", "fastvithd.mlpackage/Data/weight.bin")
# What only looks like a workplace, with what is in it, and stays whatever happens.
NEIGHBOURS = {
    ".fastvlm-notes/mine": PRECIOUS,
    ".fastvlm-0123456789abcdef/mine": PRECIOUS,
    ".fastvlm-00000000000000aa/lock": "not ours",
    ".fastvlm-00000000000000bb": PRECIOUS,
    ".out.partial-mine/mine": PRECIOUS,
    "elsewhere/bundle/mine": PRECIOUS,
}
KEPT = r"what was there before is in fastvlm-kept-\w+ beside it"
LINK = ".fastvlm-00000000000000cc"


@dataclass(frozen=True)
class Case:
    """What is done to a publisher.

    Attributes:
        start: what is at the destination: `new`, nothing; `parents`, not even the directory that it
            is in; `replace`, a bundle.
        system: `exchange`, or `renames` where the system can't exchange.
        events: what happens at which call: (what, before or after, number).
    """

    start: str
    system: str
    events: tuple[tuple[str, str, int], ...]

    @property
    def name(self) -> str:
        return " ".join([self.start, self.system, *(f"{a} {b} {n}" for a, b, n in self.events)])

    @classmethod
    def of(cls, name: str) -> Case:
        start, system, *rest = name.split()
        events = zip(rest[::3], rest[1::3], map(int, rest[2::3]), strict=True)
        return cls(start, system, tuple(events))


# By start and system: how many calls are made, and at which of them it takes its place.
Counts = dict[tuple[str, str], tuple[int, int]]
STARTS = [(a, b) for a in ("new", "parents", "replace") for b in ("exchange", "renames")]


def campaign(cases: int, seed: int, workdir: Path) -> Iterator[tuple[str, bool, str]]:
    """Run that many cases: every call killed first, in an order of the seed's; then chance's.

    Yields:
        The case's name, whether all was as it should be, and what was not.
    """
    chance = random.Random(seed)
    with _server() as serve:
        counts: Counts = {}
        for start, system in STARTS:
            directory = _fresh(workdir, start)
            (report,) = serve(directory, [Case(start, system, ())])
            counts[start, system] = report["calls"], report["step"]
            shutil.rmtree(directory)
        names = list(every_kill(counts))
        chance.shuffle(names)
        for number in range(cases):
            if number % 20 == 19:
                yield race(chance.randrange(10**9), workdir, serve)
                continue
            case = names.pop() if names and number % 4 else _random_case(chance, counts)
            yield (case.name, *_judged(case, workdir, serve))


def every_kill(counts: Counts) -> Iterator[Case]:
    for (start, system), (count, _) in counts.items():
        for number in range(1, count + 1):
            for when in ("before", "after"):
                yield Case(start, system, (("kill", when, number),))


def _random_case(chance: random.Random, counts: Counts) -> Case:
    start, system = chance.choice(STARTS)
    count, step = counts[start, system]
    intruder = chance.choice(INTRUDERS)
    # About the step itself as often as anywhere.
    number = chance.choice([chance.randint(1, count), max(1, step + chance.randint(-8, 8))])
    events = [(intruder, chance.choice(["before", "after"]), number)]
    last = chance.choice(["kill", "interrupt", None])
    if last == "interrupt" and chance.random() < 0.5:
        events = []
    if last:
        number = chance.randint(number, count + 20)
        events.append((last, chance.choice(["before", "after"]), number))
    return Case(start, system, tuple(events))


def run_case(name: str, workdir: Path) -> tuple[bool, str]:
    """One case by its name: whether all was as it should be, and what was not."""
    with _server() as serve:
        if name.startswith("race "):
            return race(int(name.removeprefix("race ")), workdir, serve)[1:]
        return _judged(Case.of(name), workdir, serve)


Serve = Callable[[Path, list[Case]], list[dict[str, Any]]]


def _judged(case: Case, workdir: Path, serve: Serve) -> tuple[bool, str]:
    directory = _fresh(workdir, case.start)
    try:
        (report,) = serve(directory, [case])
        problems = list(_problems(case, directory, report))
    # Whatever it is, it is the finding.
    except Exception:  # noqa: BLE001
        problems = [traceback.format_exc()]
    finally:
        shutil.rmtree(directory)
    return not problems, "; ".join(problems)


def _problems(case: Case, directory: Path, report: dict[str, Any]) -> Iterator[str]:
    """What is not as it should be."""
    out = _out(directory, case.start)
    struck = {name for name in INTRUDERS if (directory / f"struck-{name}").exists()}
    killed, status = report["status"] == -signal.SIGKILL, report["status"]
    if not killed and status not in (DONE, TOLD, INTERRUPTED):
        yield f"it ended with {status}: {report.get('text')}"
    if status == TOLD and "\n" in report["text"]:
        yield f"more than one line: {report['text']}"
    if status == TOLD and not struck:
        yield f"told for nothing: {report['text']}"
    if status == DONE and version(out) != "new" and not struck:
        yield f"done, and {version(out)} is there"
    old = {"old"} if case.start == "replace" else {None}
    absent = {None} if struck & {"removal"} or case.system == "renames" else set()
    theirs = {"theirs"} if "bundle" in struck else set()
    if version(out) not in old | {"new"} | absent | theirs | ({None} if struck else set()):
        yield f"{version(out)} is there"
    if not killed and (left := _hidden(out.parent)):
        yield f"it left {left} ({report.get('text')})"
    kept = ""
    try:
        with suppress(_StoppedError), appearing(look_at(out)):
            raise _StoppedError
    except DestinationError as error:
        kept = str(error)
        if not re.search(KEPT, kept):
            yield f"the next run: {kept}"
    if left := _hidden(out.parent):
        yield f"the next run left {left}"
    if not killed and re.search(KEPT, report["text"]):
        kept = report["text"]
    if not struck and version(out) not in old | {"new"}:
        yield f"after the next run {version(out)} is there"
    if kept and not struck:
        yield f"kept for nothing: {kept}"
    yield from _lost(out, struck, kept, status)
    yield from _touched(directory)
    with appearing(look_at(out)) as made:
        write(made, "newer")
    if version(out) != "newer" or _hidden(out.parent):
        yield f"the run after that left {version(out)}, {_hidden(out.parent)}"


def _lost(out: Path, struck: set[str], kept: str, status: int) -> Iterator[str]:
    """Somebody's file or bundle that is nowhere, or moved without a word."""
    moved = list(out.parent.glob("fastvlm-kept-*"))
    if status in (DONE, TOLD) and any(path.name not in kept for path in moved):
        yield "something was moved without a word"
    where = [out, *moved]
    if "file" in struck and not any((p / "thesis.txt").is_file() for p in where):
        yield "a file was lost"
    if "document" in struck and not any(p.is_file() for p in where):
        yield "a document was lost"
    if "bundle" in struck and not any(version(p) == "theirs" for p in where):
        yield "somebody's bundle was lost"


def _touched(directory: Path) -> Iterator[str]:
    for name, text in NEIGHBOURS.items():
        file = directory / name
        if not file.is_file() or file.read_text() != text:
            yield f"{name} was touched"
    if not (directory / LINK).is_symlink():
        yield "a link was removed"


def race(seed: int, workdir: Path, serve: Serve) -> tuple[str, bool, str]:
    """Several publishers to one place at once, each delayed by chance at every call."""
    chance = random.Random(seed)
    start, system = chance.choice(["new", "replace"]), chance.choice(["exchange", "renames"])
    directory = _fresh(workdir, start)
    count = chance.choice([2, 2, 3])
    cases = [
        Case(start, system, (("delay", "before", chance.randint(1, 10**6)),)) for _ in range(count)
    ]
    problems = []
    try:
        reports = serve(directory, cases)
        out = _out(directory, start)
        won = [i for i, report in enumerate(reports) if report["status"] == DONE]
        told = [i for i, report in enumerate(reports) if report["status"] == TOLD]
        if len(won) != 1 or len(won) + len(told) != count:
            problems.append(f"{len(won)} of {count} won: {[r.get('text') for r in reports]}")
        if version(out) not in {f"new{i}" for i in won}:
            problems.append(f"{version(out)} is there, {won} won")
        if left := _hidden(directory):
            problems.append(f"it left {left}")
        problems += _touched(directory)
    finally:
        shutil.rmtree(directory)
    return f"race {seed}", not problems, "; ".join(problems)


class _StoppedError(Exception):
    pass


def _unsynced(fd: int) -> None:
    pass


def write(directory: Path, text: str) -> None:
    """A bundle of a few files, every one of which says which it is."""
    for name in FILES:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    keys = ("schema_version", "layout", "source", "encoder", "llm", "gates")
    listed = {name: {} for name in FILES}
    (directory / "manifest.json").write_text(json.dumps(dict.fromkeys(keys) | {"files": listed}))


def version(bundle: Path) -> str | None:
    """What all of its files say; None if it is absent."""
    if not bundle.is_dir():
        return None
    files = {p.relative_to(bundle).as_posix(): p for p in bundle.rglob("*") if p.is_file()}
    for name in ("thesis.txt", "manifest.json"):
        files.pop(name, None)
    if not files:
        return None
    texts = {path.read_text() for path in files.values()}
    return texts.pop() if len(texts) == 1 and len(files) == 3 else f"a mixture ({sorted(files)})"


def _out(directory: Path, start: str) -> Path:
    return directory / "made" / "out" if start == "parents" else directory / "out"


def _hidden(directory: Path) -> list[str]:
    known = {name.partition("/")[0] for name in NEIGHBOURS} | {LINK}
    names = os.listdir(directory) if directory.is_dir() else []
    return [name for name in names if name.startswith(".") and name not in known]


def _fresh(workdir: Path, start: str) -> Path:
    workdir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=workdir))
    for name, text in NEIGHBOURS.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    (directory / LINK).symlink_to("elsewhere")
    if start == "replace":
        write(directory / "out", "old")
    return directory


@contextmanager
def _server() -> Iterator[Serve]:
    """A small process that forks the publishers: they take milliseconds each, wherever the
    campaign itself runs. The campaign's own runs sync nothing either."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.kills", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    lines, answers = process.stdin, process.stdout
    if lines is None or answers is None:
        raise RuntimeError("no pipes")

    def serve(directory: Path, cases: list[Case]) -> list[dict[str, Any]]:
        lines.write(json.dumps([str(directory), [case.name for case in cases]]) + "\n")
        lines.flush()
        statuses = json.loads(answers.readline())
        reports = []
        for number, status in enumerate(statuses):
            file = directory / f"report-{number}"
            text = file.read_text() if file.exists() else ""
            reports.append({"status": status, **(json.loads(text) if text else {})})
        return reports

    try:
        with patch.object(os, "fsync", _unsynced):
            yield serve
    finally:
        lines.close()
        process.wait()
        answers.close()


def _serve() -> None:
    for line in sys.stdin:
        directory, names = json.loads(line)
        children = []
        for number, name in enumerate(names):
            child = os.fork()
            if child == 0:
                os._exit(_publisher(Path(directory), Case.of(name), number, len(names)))
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)


def _publisher(directory: Path, case: Case, number: int, count: int) -> int:
    """The child: publish, with the case's events. Returns its exit status."""
    out = _out(directory, case.start)
    if case.system == "renames":
        renames._system_call = lambda: None  # type: ignore[assignment]
    hooks = Hooks(case, directory, out)
    text = f"new{number}" if count > 1 else "new"
    status, told = DONE, ""
    try:
        destination = check_replaceable(out, overwrite=case.start == "replace")
        hooks.install()
        if count > 1:
            _wait_for_all(directory, number, count)
        with appearing(destination) as made:
            hooks.active = False
            write(made, text)
            hooks.active = True
    except DestinationError as error:
        status, told = TOLD, str(error)
    except KeyboardInterrupt:
        status = INTERRUPTED
    # Whatever it is, it is the finding.
    except BaseException:  # noqa: BLE001
        status, told = BROKEN, traceback.format_exc()
    hooks.active = False
    report = {"calls": hooks.count, "step": hooks.step, "text": told}
    (directory / f"report-{number}").write_text(json.dumps(report))
    return status


def _wait_for_all(directory: Path, number: int, count: int) -> None:
    (directory / f"ready-{number}").touch()
    while not all((directory / f"ready-{i}").exists() for i in range(count)):
        time.sleep(0.0002)


class Hooks:
    """Counts the calls to the filesystem in this process, and lets the events happen."""

    def __init__(self, case: Case, directory: Path, out: Path):
        self.count, self.step, self.active = 0, 0, False
        self._directory, self._out = directory, out
        self._events = [event for event in case.events if event[0] != "delay"]
        delays = [random.Random(n) for what, _, n in case.events if what == "delay"]
        self._delay = delays[0] if delays else None

    def install(self) -> None:
        os.fsync = _unsynced
        for name in HOOKED:
            setattr(os, name, self._hooked(getattr(os, name)))
        fcntl.flock = self._hooked(fcntl.flock)
        renames._flagged = self._hooked(self._stepping(renames._flagged))
        # By which the record is read and written.
        builtins.open = self._hooked(builtins.open)
        self.active = True

    def _stepping(self, call: Callable[..., None]) -> Callable[..., None]:
        def stepping(*arguments: Any) -> None:
            self.step = self.count
            call(*arguments)

        return stepping

    def _hooked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*arguments: Any, **options: Any) -> Any:
            if not self.active:
                return call(*arguments, **options)
            self.count += 1
            number = self.count
            self._happen("before", number)
            result = call(*arguments, **options)
            self._happen("after", number)
            return result

        return hooked

    def _happen(self, when: str, number: int) -> None:
        if self._delay and when == "before" and self._delay.random() < 0.3:
            time.sleep(self._delay.random() * 0.002)
        for event in [e for e in self._events if e[1:] == (when, number)]:
            self._events.remove(event)
            self.active = False
            what = event[0]
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what != "interrupt":
                getattr(self, f"_intrude_{what}")()
                (self._directory / f"struck-{what}").touch()
            self.active = True
            if what == "interrupt":
                raise KeyboardInterrupt

    def _intrude_file(self) -> None:
        # What a shell does: between the two, everything may be exchanged.
        self._out.mkdir(parents=True, exist_ok=True)
        (self._out / "thesis.txt").write_text(PRECIOUS)

    def _intrude_document(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        self._out.parent.mkdir(exist_ok=True)
        self._out.write_text(PRECIOUS)

    def _intrude_removal(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)

    def _intrude_bundle(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        write(self._out, "theirs")


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        _serve()
        return
    with tempfile.TemporaryDirectory() as workdir:
        good, note = run_case(" ".join(sys.argv[1:]), Path(workdir))
    print(note or "as it should be")
    sys.exit(not good)


if __name__ == "__main__":
    main()
