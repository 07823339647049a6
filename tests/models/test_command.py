"""`fastvlm generate CHECKPOINT` and `fastvlm models`, as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from fastvlm_mlx.models import cache

ASK = ("--prompt", "Describe the image.", "--max-tokens", "4")


@pytest.fixture
def fastvlm(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "fastvlm_mlx", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "80"},
        )

    return start


def test_the_list_and_what_is_removed(fastvlm, cache_directory):
    def make(target, partial):
        target.mkdir()
        (target / "weights").write_bytes(bytes(1_500_000))

    key = cache.Key("me/bundle", {"hub": "me/bundle@1"})
    planned = cache.Entry("me/bundle", "bundle", "me/bundle on the hub", "", 0, 0.0, "me/bundle")
    cache.obtain(key, planned, make, waiting="")
    listed = fastvlm("models", "--json").communicate()[0]
    (found,) = [row for row in json.loads(listed)["models"] if row["cached"]]
    assert (found["name"], found["bytes"]) == ("me/bundle", 1_500_000)
    assert found["path"].startswith(str(cache_directory))
    wrong = fastvlm("models", "--remove", "me/other")
    assert "expected me/bundle, or all" in wrong.communicate()[1]
    assert wrong.returncode == 2
    removed = fastvlm("models", "--remove", "me/bundle").communicate()[0]
    assert removed == "removed me/bundle, bundle, 1.5 MB\n1.5 MB are free again\n"
    assert list(cache_directory.iterdir()) == []


def test_a_mistake_is_told_before_anything_is_exported(fastvlm, demo_checkpoint, tmp_path):
    missing = fastvlm("generate", demo_checkpoint, "--image", tmp_path / "none.png", *ASK)
    assert "none.png" in missing.communicate()[1]
    assert missing.returncode == 2
    assert cache.entries() == []


@pytest.mark.slow
class TestAWholeExport:
    def test_two_at_once_export_once_and_both_answer(self, fastvlm, demo_checkpoint, tmp_path):
        words = ("generate", demo_checkpoint, "--image", tmp_path / "a.png", *ASK)
        both = [fastvlm(*words) for _ in range(2)]
        ended = [process.communicate(timeout=300) for process in both]
        assert [process.returncode for process in both] == [0, 0], ended
        assert ended[0][0] == ended[1][0] != ""
        said = ended[0][1] + ended[1][1]
        assert said.count("is a checkpoint: it is exported once") == 1
        assert said.count("another process exports") == 1
        again = fastvlm(*words).communicate(timeout=300)
        assert again[0] == ended[0][0]
        assert "export" not in again[1]

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    def test_what_ends_it_leaves_nothing_that_is_taken_for_whole(
        self, fastvlm, demo_checkpoint, tmp_path, cache_directory, number
    ):
        words = ("generate", demo_checkpoint, "--image", tmp_path / "a.png", *ASK)
        process = fastvlm(*words)
        for line in process.stderr:
            if "language model" in line:
                break
        time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert cache.entries() == []
        if number != signal.SIGKILL:
            assert [path.name for path in cache_directory.iterdir()] == [cache.HASHES]
        assert fastvlm(*words).wait(300) == 0
        assert len(cache.entries()) == 1
        assert cache.unfinished() == []
        assert not list(cache_directory.rglob(".fastvlm-*"))
