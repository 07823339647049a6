"""Whether the campaign can tell bad from good: faults planted on purpose, one for each rule."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import planted
from tests.fuzz.pool import Limits, Request, run_all
from tests.fuzz.stock import SECRET, Stock

GOOD = ("good_error", "good_answer")


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """Planted faults need no bundles."""
    found = Stock(tmp_path_factory.mktemp("stock").resolve())
    found.outside.mkdir()
    (found.outside / "secret.txt").write_text(SECRET)
    return found


def test_every_planted_fault_is_found(stock, tmp_path):
    cases = [Request("planted", 0, number) for number in range(len(planted.FAULTS))]
    limits = Limits(seconds=3, memory=500_000_000)
    found = {}
    for result in run_all(cases, stock, limits=limits, keep=tmp_path / "kept"):
        found[planted.FAULTS[result.request.number].__name__] = [c for c, _ in result.findings]
    words = {
        "foreign": "KeyError",
        "panic": "BaseException",
        "two_lines": "unprintable characters",
        "escapes": "unprintable characters",
        "long": "error too long",
        "nameless": "error names nothing",
        "other_name": "file not named",
        "refused": "refused",
        "accepted": "accepted",
        "other_answer": "wrong answer",
        "noise": "output of its own",
        "source_changed": "source changed",
        "outside_read": "read outside",
        "secret_copied": "secret copied",
        "hang": "hang at",
        "memory": "memory at",
        "dies": "died of SIGSEGV",
    }
    assert {name for name, causes in found.items() if not causes} == set(GOOD)
    for name, word in words.items():
        assert word in " ".join(found[name]), (name, found[name])
    assert set(words) | set(GOOD) == set(found)
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert len(kept) == len(words)
    assert (tmp_path / "kept" / "planted-0-2" / "source" / "file.png").is_file()


def test_a_kept_case_runs_alone_and_is_bad_again(stock, tmp_path):
    (first,) = run_all([Request("planted", 0, 2)], stock, keep=tmp_path)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz", "--stock", str(stock.directory)),
            *("--case", str(tmp_path / first.request.name)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == 1
    assert "KeyError" in run.stdout
