"""`python -m tests.fuzz`: the campaign from the command line."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.case import SHARES
from tests.fuzz.pool import Request, Result, run_all
from tests.fuzz.stock import Stock

FAILURES = Path(__file__).parent / "failures"
# Of a hundred cases.
KILLS = 5


def requests(count: int, seed: int, kinds: Iterable[str]) -> list[Request]:
    """`count` cases over the kinds by their shares, at least one of each, kind by kind."""
    wanted = {kind: SHARES[kind] for kind in kinds if kind in SHARES}
    total = sum(wanted.values())
    made = []
    for kind, share in wanted.items():
        number = max(1, round(count * share / total))
        made += [Request(kind, seed, i) for i in range(number)]
    return made


def kills(count: int, seed: int) -> Iterator[Result]:
    """The kills, where they are: `kills.campaign` yields name, whether it is good, and a note."""
    from tests.fuzz.kills import campaign

    with tempfile.TemporaryDirectory(prefix="fuzz-kills-") as directory:
        started = time.perf_counter()
        for number, (name, good, note) in enumerate(campaign(count, seed, Path(directory))):
            findings = [] if good else [(f"kill: {name}", note)]
            seconds = time.perf_counter() - started
            yield Result(Request("kills", seed, number), findings, seconds=seconds)
            started = time.perf_counter()


def table(results: Iterable[Result]) -> str:
    rows: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        rows[result.request.kind].append(result)
    head = f"{'kind':<14}{'tried':>8}{'good':>8}{'bad':>8}{'slowest s':>12}{'memory MB':>12}"
    lines = [head]
    if len(rows) > 1:
        rows["all"] = [result for found in list(rows.values()) for result in found]
    for kind, found in rows.items():
        bad = sum(bool(result.findings) for result in found)
        lines.append(
            f"{kind:<14}{len(found):>8}{len(found) - bad:>8}{bad:>8}"
            f"{max(r.seconds for r in found):>12.1f}{max(r.memory for r in found) / 1e6:>12.0f}"
        )
    return "\n".join(lines)


def causes(results: Iterable[Result]) -> str:
    """Every cause with its number of cases and the first of them."""
    by_cause: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        for cause in dict(result.findings):
            by_cause[cause].append(result)
    ordered = sorted(by_cause.items(), key=lambda item: (-len(item[1]), item[0]))
    lines = []
    for cause, found in ordered:
        kinds = ", ".join(sorted({result.request.kind for result in found}))
        detail = next(d for c, d in found[0].findings if c == cause)
        first = detail.strip().splitlines()[0] if detail.strip() else ""
        lines.append(f"{len(found):5} × {cause} [{kinds}]")
        lines.append(f"        {found[0].request.name}: {first[:300]}")
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    known = [*SHARES, "kills"] if find_spec("tests.fuzz.kills") else [*SHARES]
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(known), help="some of " + ", ".join(known))
    parser.add_argument("--keep", type=Path, default=FAILURES, help="where bad cases are put")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", type=Path, help="run this one alone, as it was kept")
    parser.add_argument("--stock", type=Path, help="keep the undamaged inputs here, and reuse them")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds.split(",")) - set(known) - {"planted"}:
        parser.error(f"--kinds has {', '.join(sorted(unknown))}: expected {', '.join(known)}")
    return arguments


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="fuzz-stock-") as directory:
        home = (arguments.stock or Path(directory)).resolve()
        if (home / "outside").is_dir():
            stock = Stock(home)
        else:
            print("making bundles and checkpoints to damage", file=sys.stderr)
            stock = Stock.make(home)
        if arguments.case is not None:
            return _alone(arguments.case.resolve(), stock)
        return _campaign(arguments, stock)


def _alone(directory: Path, stock: Stock) -> int:
    record = json.loads((directory / "case.json").read_text())
    request = Request(record["kind"], record["seed"], record["number"])
    # The files of what is a frequent cause are not kept; they are made again.
    replay = None if record["facts"] is None else directory
    if replay:
        _point_to(replay, record["stock"], str(stock.directory))
    (result,) = run_all([request], stock, replay=replay)
    for cause, detail in result.findings:
        print(f"{cause}\n{detail}\n")
    print(f"{request.name}: {'bad' if result.findings else 'good'} {result.outcomes}")
    return 1 if result.findings else 0


def _point_to(directory: Path, earlier: str, now: str) -> None:
    """Lead a kept case's links, and the adapters' bases, to the stock that there is now."""
    for path in directory.rglob("*"):
        if path.is_symlink():
            target = os.readlink(path)
            path.unlink()
            path.symlink_to(target.replace(earlier, now))
        elif path.name in ("adapter_config.json", "case.json"):
            data = path.read_bytes()
            path.write_bytes(data.replace(earlier.encode(), now.encode()))


def _campaign(arguments: argparse.Namespace, stock: Stock) -> int:
    kinds = arguments.kinds.split(",")
    wanted = requests(arguments.cases, arguments.seed, kinds)
    shutil.rmtree(arguments.keep, ignore_errors=True)
    results, started = [], time.perf_counter()
    found = run_all(wanted, stock, jobs=arguments.jobs, keep=arguments.keep)
    for result in found:
        results.append(result)
        if result.findings:
            print(f"bad: {result.request.name}: {result.findings[0][0]}", file=sys.stderr)
        if len(results) % 50 == 0:
            bad = sum(bool(result.findings) for result in results)
            seconds = time.perf_counter() - started
            text = f"{len(results)} of {len(wanted)}, {bad} bad, {seconds:.0f} s"
            print(f"{text}, {result.request.kind}", file=sys.stderr)
    if "kills" in kinds:
        results += kills(max(1, arguments.cases * KILLS // 100), arguments.seed)
    results.sort(key=lambda result: (*SHARES, "kills", "planted").index(result.request.kind))
    bad = [result for result in results if result.findings]
    if bad:
        print(causes(bad))
        print(f"\nbad cases are in {arguments.keep}: python -m tests.fuzz --case DIRECTORY\n")
    print(table(results))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
