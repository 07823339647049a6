"""`fastvlm map` killed at random: every image is answered once, every broken one is told."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from model_export.samples import scenes

PROMPT = "Describe the image."
# Forks a process for each command line, so that what a run imports is imported once.
RUNS = """
import json, os, sys
import torch
import fastvlm_mlx.mapping
from fastvlm_mlx.cli.main import main
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["fastvlm", *json.loads(line)]
        main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Runs of `fastvlm map` with the same command line."""

    def __init__(self, bundle, folder, out):
        self.out = out
        self.command = ["map", bundle, folder, "--prompt", PROMPT, "--out", out]
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUNS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self):
        """The process that runs."""
        print(json.dumps(list(map(str, self.command))), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def end(self):
        """Its exit status."""
        return int(self.process.stdout.readline())

    def killed(self, rows, wait_s):
        """Kill a run some time after the file has so many rows; the file's whole lines then."""
        running = self.start()
        until = time.monotonic() + 600
        while not self.out.exists() or self.out.read_bytes().count(b"\n") < rows:
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(wait_s)
        os.kill(running, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL
        data = self.out.read_bytes()
        return data[: data.rindex(b"\n") + 1]


def fill(folder, good, broken):
    """Scenes, and files that are no images in the ways that there are; the names of the latter."""
    whole = folder / "first.png"
    scenes.generate(0).draw(256).save(whole)
    data, names = whole.read_bytes(), []
    for number in range(1, good):
        path = folder / f"part{number % 5}" / f"{number:05}.png"
        path.parent.mkdir(exist_ok=True)
        scenes.generate(number).draw(256).save(path)
    for number in range(broken):
        path = folder / f"part{number % 5}" / f"{number * good // broken:05}-broken.jpg"
        path.parent.mkdir(exist_ok=True)
        kind = number % 5
        if kind == 3:
            path.symlink_to("nowhere")
        elif kind == 4:
            os.mkfifo(path)
        else:
            path.write_bytes((data[: len(data) // 2], b"", b"no image")[kind])
        names.append(path.relative_to(folder).as_posix())
    return names


@pytest.mark.parametrize(
    ("images", "broken", "kills"),
    [(40, 5, 2), pytest.param(2000, 20, 5, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments(demo_bundle, tmp_path, images, broken, kills):
    folder, out = tmp_path / "images", tmp_path / "captions.jsonl"
    folder.mkdir()
    bad = fill(folder, images - broken, broken)
    runs = Runs(demo_bundle, folder, out)
    chance = random.Random(images)
    moments = sorted(chance.randrange(1, images * 3 // 4) for _ in range(kills))
    before = b""
    try:
        for rows in moments:
            now = runs.killed(rows, chance.random() / 20)
            assert now.startswith(before)
            before = now
        assert before.count(b"\n") < images
        runs.start()
        assert runs.end() == 1
    finally:
        runs.process.kill()
        runs.process.communicate()
    assert out.read_bytes().startswith(before)
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    listed = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*g")]
    assert sorted(row["image"] for row in found) == sorted(listed)
    assert len(found) == images
    assert {row["image"] for row in found if row["error"]} == set(bad)
    assert all(row["text"] for row in found if not row["error"])
    # Each answer is about its own image: the demo errs on few.
    answered = {row["image"]: row["text"] for row in found if not row["error"]}
    told = {name: int(name[-9:-4]) if "/" in name else 0 for name in answered}
    right = [scenes.generate(told[name]).describe() == text for name, text in answered.items()]
    assert sum(right) > 0.9 * len(right)
