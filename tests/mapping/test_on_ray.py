"""The workers of a local Ray: one of them is killed, and every image is answered once."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.mapping import Job, map_folder
from model_export.samples import scenes

PROMPT = "Describe the image."
IMAGES = 240


def workers():
    """The processes of this user that are workers of `on_ray` and have loaded a model."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    lines = [line.split(None, 1) for line in found.stdout.splitlines()]
    return {int(pid) for pid, name in lines if "ray::MapWorker(MapBatches(Asking))" in name}


def below(process):
    """A process, and all that it has begun."""
    found = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in found.stdout.splitlines()[1:]]
    known = {process}
    while more := {pid for pid, parent in pairs if parent in known} - known:
        known |= more
    return known


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    for seed in range(IMAGES):
        scenes.generate(seed).draw(256).save(path / f"{seed:03}.png")
    (path / "broken.png").write_bytes(b"no image")
    return path


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(demo_bundle, folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    command = ["map", demo_bundle, folder, "--prompt", PROMPT, "--out", out]
    command += ["--ray", "2", "--batch-size", "8"]
    running = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_mlx", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    until = time.monotonic() + 300
    while not out.exists() or out.read_bytes().count(b"\n") < 20:
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)
    ours = below(running.pid) & workers()
    assert len(ours) == 2
    os.kill(ours.pop(), signal.SIGKILL)
    _, said = running.communicate(timeout=500)
    assert running.returncode == 1, said
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert sorted(row["image"] for row in found) == sorted(os.listdir(folder))
    assert [row["image"] for row in found if row["error"]] == ["broken.png"]
    # What this process says alone.
    tally = map_folder(Job(demo_bundle, folder, PROMPT), tmp_path / "alone.jsonl")
    assert tally.new == IMAGES + 1
    alone = (tmp_path / "alone.jsonl").read_bytes().splitlines()
    assert sorted(alone) == sorted(out.read_bytes().splitlines())


@pytest.mark.slow
def test_a_worker_s_error_is_told_as_it_is_here(demo_bundle, folder, tmp_path):
    job = replace(Job(demo_bundle, folder, " "), batch_size=100)
    with pytest.raises(PromptError, match="empty"):
        map_folder(job, tmp_path / "captions.jsonl", ray=1)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
