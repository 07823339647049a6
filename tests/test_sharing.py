"""What processes share is made once, whole, by the first that asks."""

import subprocess
import sys
from pathlib import Path

import pytest
from sharing import Shared

MAKE = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[2])
from sharing import Shared
def make(out):
    time.sleep(0.3)
    out.mkdir()
    (out / "value").write_text("whole")
    print("made")
factory = SimpleNamespace(getbasetemp=lambda: Path(sys.argv[1]))
print((Shared(factory).get("thing", "bundle", make) / "value").read_text())
"""


def test_of_many_processes_one_makes_it_and_all_see_it_whole(tmp_path):
    command = [sys.executable, "-c", MAKE, str(tmp_path), str(Path(__file__).parent)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(process.communicate()[0].split() for process in started)
    assert said == [["made", "whole"], ["whole"], ["whole"]]


def test_what_failed_is_made_again(tmp_path_factory):
    shared = Shared(tmp_path_factory)

    def fails(out):
        out.mkdir()
        raise RuntimeError("half of it")

    with pytest.raises(RuntimeError, match="half of it"):
        shared.get("failing", "bundle", fails)
    made = shared.get("failing", "bundle", lambda out: out.mkdir())
    assert made.is_dir()
    assert shared.get("failing", "bundle", fails) == made
