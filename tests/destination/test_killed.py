"""An export that is killed: the destination is absent or a whole bundle, whenever it happens."""

import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fastvlm_mlx.bundle.bundle import Bundle

KILLS = 20


class Exports:
    """Runs of `fastvlm export` to one destination, with a temporary directory of their own."""

    def __init__(self, checkpoint: Path, root: Path):
        self.out, self.temporary = root / "out", root / "temporary"
        self.temporary.mkdir()
        self.command = [sys.executable, "-m", "fastvlm_mlx", "export", str(checkpoint)]
        self.command += [str(self.out), "--llm-bits", "4", "--overwrite"]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )

    def whole(self) -> float:
        """Seconds of a run that nobody kills."""
        started = time.perf_counter()
        assert self.start().wait() == 0
        return time.perf_counter() - started

    def killed(self, after_s: float) -> bool:
        """Whether a run was killed before its end."""
        process = self.start()
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=after_s) != 0
        process.kill()
        process.wait()
        return True


@pytest.mark.slow
def test_killed_at_random_moments(demo_checkpoint, tmp_path):
    exports = Exports(demo_checkpoint, tmp_path)
    seconds = exports.whole()
    # One in each twentieth of the export, so that none of its stages is left out; over a bundle
    # that is there in the first half, and where there is none in the second.
    chance = random.Random(3)
    moments = [(i + chance.random()) / KILLS * seconds for i in range(KILLS)]
    chance.shuffle(moments)
    killed = 0
    for number, moment in enumerate(moments):
        if number >= KILLS // 2:
            shutil.rmtree(exports.out, ignore_errors=True)
        before = exports.out.exists()
        killed += exports.killed(moment)
        if exports.out.exists():
            bundle = Bundle.open(exports.out)
            assert bundle.manifest is not None
            bundle.check_files()
        else:
            assert not before
    assert killed > KILLS // 2
    exports.whole()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "temporary"]
    assert list(exports.temporary.iterdir()) == []
    Bundle.open(exports.out).check_files()
