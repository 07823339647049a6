"""The cache of models: what is in it is whole, made once, private, and removed without harm."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_mlx.errors import CheckpointError, DestinationError, OptionError
from fastvlm_mlx.models import cache, listing

KEY = cache.Key("owner/name", {"hub": "owner/name@1"})
PLANNED = cache.Entry("owner/name", "bundle", "a test", "", 0, 0.0)
WAITING = "another one makes it"


def make(target, partial):
    target.mkdir()
    (target / "weights").write_bytes(b"12345")


def never(target, partial):
    raise AssertionError("it was there")


def obtain(make=make, key=KEY, planned=PLANNED):
    return cache.obtain(key, planned, make, waiting=WAITING)


def left(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


class TestWhere:
    def test_the_variable_moves_it(self, cache_directory):
        assert cache.directory() == cache_directory

    @pytest.mark.parametrize(
        ("xdg", "expected"),
        [("/somewhere", "/somewhere"), ("relative", "~/.cache"), ("", "~/.cache")],
    )
    def test_on_linux(self, xdg, expected, monkeypatch):
        monkeypatch.delenv("FASTVLM_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        monkeypatch.setattr(sys, "platform", "linux")
        assert cache.directory() == Path(expected).expanduser() / "fastvlm-mlx" / "models"

    def test_on_a_mac(self, monkeypatch):
        monkeypatch.delenv("FASTVLM_CACHE")
        monkeypatch.setattr(sys, "platform", "darwin")
        expected = Path("~/Library/Caches/fastvlm-mlx/models").expanduser()
        assert cache.directory() == expected

    def test_it_is_the_user_s_own(self, cache_directory):
        entry = obtain()
        for directory in (cache_directory, Path(entry.place)):
            assert directory.stat().st_mode & 0o777 == 0o700

    def test_others_may_not_write_to_it(self, cache_directory):
        cache_directory.mkdir(parents=True)
        cache_directory.chmod(0o777)
        with pytest.raises(DestinationError, match=r"others may write to it.*chmod go-w"):
            obtain()

    def test_a_link_in_its_place(self, cache_directory, tmp_path):
        cache_directory.parent.mkdir()
        cache_directory.symlink_to(tmp_path)
        with pytest.raises(DestinationError, match="is no directory"):
            obtain()


class TestMaking:
    def test_it_is_made_once(self):
        first = obtain()
        assert (first.path / "weights").read_bytes() == b"12345"
        assert first.bytes == 5
        assert replace(obtain(never), used=0) == replace(first, used=0)

    def test_a_path_that_is_not_utf_8(self):
        path = "/models/caf\udce9"
        key, planned = cache.Key(path, {"files": "1"}), replace(PLANNED, name=path)
        entry = obtain(key=key, planned=planned)
        assert obtain(never, key, planned).path == entry.path
        listing.rows()[0].names[0].encode()
        assert len(listing.remove(path)) == 1

    def test_it_is_on_the_disk_before_it_is_taken_for_whole(self, monkeypatch):
        synced, replaced = [], []
        fsync, move = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
        monkeypatch.setattr(os, "replace", lambda *ends: (replaced.append([*synced]), move(*ends)))
        entry = obtain()
        for path in (entry.path, entry.path / "weights"):
            assert path.stat().st_ino in replaced[-1]

    def test_another_identity_is_another_model(self):
        obtain()
        assert cache.find(cache.Key("owner/name", {"hub": "owner/name@2"})) is None

    def test_nothing_but_the_model_stays(self, cache_directory):
        entry = obtain()
        place = Path(entry.place).name
        expected = [place, f"{place}/entry.json", f"{place}/model", f"{place}/model/name"]
        assert left(cache_directory) == [*expected, f"{place}/model/name/weights"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError("no"), SystemExit(143)])
    def test_what_fails_leaves_only_what_is_resumed(self, cache_directory, error):
        def fail(target, partial):
            make(target, partial)
            partial.mkdir()
            (partial / "half").touch()
            raise error

        with pytest.raises(type(error) if isinstance(error, Exception) else BaseException):
            obtain(fail)
        assert cache.find(KEY) is None
        assert [name for name in left(cache_directory) if "/" in name] == [
            f"{KEY.directory}/partial",
            f"{KEY.directory}/partial/half",
        ]

        def resume(target, partial):
            assert (partial / "half").exists()
            make(target, partial)

        assert not (Path(obtain(resume).place) / "partial").exists()

    def test_a_full_disk_is_a_sentence(self, cache_directory):
        def full(target, partial):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

        with pytest.raises(DestinationError, match=r"is full: make room .* FASTVLM_CACHE"):
            obtain(full)
        assert left(cache_directory) == []

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_directory_that_can_t_be_written(self, cache_directory):
        cache_directory.parent.mkdir()
        cache_directory.parent.chmod(0o500)
        with pytest.raises(DestinationError, match="can't be read or written"):
            obtain()

    @pytest.mark.parametrize(
        "change",
        [
            {"directory": ".."},
            {"directory": "/etc"},
            {"directory": "gone"},
            {"bytes": "many"},
            {"what": None},
        ],
    )
    def test_what_describes_no_model_is_made_anew(self, change):
        entry = obtain()
        file = Path(entry.place, cache.ENTRY)
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        assert cache.find(KEY) is None
        assert cache.unfinished() == [Path(entry.place)]
        assert obtain().path == entry.path

    def test_a_model_without_its_entry_is_made_anew(self):
        entry = obtain()
        Path(entry.place, cache.ENTRY).unlink()
        (entry.path / "foreign").touch()
        assert not (obtain().path / "foreign").exists()


CHILD = """
import sys, time
from pathlib import Path
from fastvlm_mlx.models import cache
def make(target, partial):
    Path(sys.argv[1]).open("a").write("x")
    target.mkdir()
    (target / "weights").write_bytes(b"12345")
    time.sleep(float(sys.argv[2]))
key = cache.Key("owner/name", {"hub": "owner/name@1"})
planned = cache.Entry("owner/name", "bundle", "a test", "", 0, 0.0)
cache.obtain(key, planned, make, waiting="WAITING")
"""


class TestSeveralProcesses:
    @pytest.fixture
    def child(self, tmp_path):
        children = []

        def start(seconds):
            command = [sys.executable, "-c", CHILD, str(tmp_path / "made"), str(seconds)]
            children.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            return children[-1]

        yield start
        for process in children:
            process.kill()
            process.communicate()

    def made(self, tmp_path, times):
        deadline = time.monotonic() + 30
        while not (tmp_path / "made").exists() or len((tmp_path / "made").read_text()) < times:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_the_second_waits_for_the_first_and_says_so(self, child, tmp_path):
        first = child(1.0)
        self.made(tmp_path, 1)
        second = child(0)
        assert "WAITING" in second.communicate(timeout=30)[1]
        assert first.wait(30) == second.returncode == 0
        assert (tmp_path / "made").read_text() == "x"

    def test_a_killed_one_leaves_nothing_that_is_taken_for_whole(self, child, tmp_path):
        first = child(60)
        self.made(tmp_path, 1)
        assert cache.find(KEY) is None
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        assert cache.find(KEY) is None
        assert obtain().bytes == 5

    def test_a_wait_ends_with_ctrl_c(self, child, tmp_path):
        child(60)
        self.made(tmp_path, 1)
        second = child(0)
        assert "WAITING" in second.stderr.readline()
        second.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in second.communicate(timeout=30)[1]

    def test_what_is_being_made_is_not_removed(self, child, tmp_path, cache_directory):
        child(60)
        self.made(tmp_path, 1)
        with pytest.raises(DestinationError, match="being made by another process"):
            listing.remove("all")
        assert (cache_directory / KEY.directory / "model" / "name" / "weights").exists()

    def test_threads_make_it_once_too(self):
        made = []

        def slow(target, partial):
            made.append(target)
            time.sleep(0.2)
            make(target, partial)

        threads = [threading.Thread(target=obtain, args=(slow,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1


class TestRemoving:
    @pytest.fixture
    def outside(self, tmp_path):
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "precious").touch()
        return tmp_path / "outside"

    def test_hashes_that_are_somebody_s_stay(self, cache_directory):
        hashes = cache_directory / cache.HASHES
        hashes.mkdir(parents=True)
        cache_directory.chmod(0o700)
        for name in ("0" * 32 + ".json", "0" * 32 + ".json.123.new", "thesis.txt"):
            (hashes / name).touch()
        listing.remove("all")
        assert left(cache_directory) == ["hashes", "hashes/thesis.txt"]
        (hashes / "thesis.txt").unlink()
        listing.remove("all")
        assert left(cache_directory) == []

    def test_a_directory_that_has_a_model_of_its_own_stays(self, cache_directory):
        mine = cache_directory / "resnet-0123456789abcdef" / "model" / "weights.bin"
        mine.parent.mkdir(parents=True)
        mine.touch()
        listing.remove("all")
        assert mine.exists()

    def test_links_in_a_circle_are_a_name_like_any(self, tmp_path):
        obtain()
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(OptionError, match="no model in the cache"):
            listing.remove(str(tmp_path / "loop"))

    def test_links_are_not_followed(self, outside, cache_directory):
        entry = obtain()
        (entry.path / "link").symlink_to(outside)
        (cache_directory / f"stray-{'0' * 16}").symlink_to(outside)
        listing.remove("all")
        assert (outside / "precious").exists()
        assert not Path(entry.place).exists()

    def test_what_the_cache_did_not_make_stays(self, cache_directory):
        obtain()
        (cache_directory / "notes.txt").touch()
        (cache_directory / "mine").mkdir()
        listing.remove("all")
        assert left(cache_directory) == ["mine", "notes.txt"]

    def test_what_is_only_called_as_a_model_is_stays(self, cache_directory):
        entry = obtain()
        # A Mac's Finder was there.
        Path(entry.place, ".DS_Store").touch()
        mine = cache_directory / "run-0123456789abcdef"
        mine.mkdir()
        (mine / "weights.bin").touch()
        (cache_directory / f"{mine.name}.lock").write_text("mine")
        assert [row.names[0] for row in listing.remove("all")] == ["owner/name"]
        assert left(cache_directory) == [
            mine.name,
            f"{mine.name}.lock",
            f"{mine.name}/weights.bin",
        ]

    def test_by_any_of_its_names(self):
        planned = replace(PLANNED, name="apple/FastVLM-0.5B", reference="apple/FastVLM-0.5B")
        key = cache.Key("apple/FastVLM-0.5B", {"hub": "a"})
        for name in ("fastvlm-0.5b", "FastVLM-0.5B", "apple/FastVLM-0.5B", key.directory):
            obtain(key=key, planned=planned)
            assert [row.names[0] for row in listing.remove(name)] == ["fastvlm-0.5b"]
            assert cache.entries() == []

    def test_a_name_that_is_not_there(self):
        with pytest.raises(OptionError, match="and it is empty"):
            listing.remove("fastvlm-0.5b")
        obtain()
        with pytest.raises(OptionError, match="expected owner/name, or all"):
            listing.remove("fastvlm-0.5b")

    def test_all_of_nothing(self):
        assert listing.remove("all") == []

    def test_what_was_interrupted_is_listed_and_removed(self, cache_directory):
        (cache_directory / KEY.directory / "partial").mkdir(parents=True)
        (cache_directory / KEY.directory / "partial" / "half").write_bytes(b"123")
        (row,) = [row for row in listing.rows() if row.what == listing.INTERRUPTED]
        assert (row.names, row.bytes) == ((KEY.directory,), 3)
        listing.remove(KEY.directory)
        assert left(cache_directory) == []


def test_the_list_has_what_is_published_and_what_is_cached():
    obtain()
    rows = listing.rows()
    assert [row.names[0] for row in rows[:2]] == ["owner/name", "fastvlm-0.5b"]
    assert len(rows) == 13
    assert rows[0].to_dict()["cached"]
    assert rows[0].to_dict()["last_used"].endswith("Z")
    assert rows[1].to_dict()["path"] is None
