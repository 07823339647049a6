"""Where a bundle appears: nothing of anybody else's is lost, and nobody sees half of one."""

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path

import pytest
from staged import killed

from fastvlm_mlx.errors import DestinationError
from model_export.comparison import sweep
from model_export.destination import leftovers, renames
from model_export.destination.content import content_of
from model_export.destination.destination import (
    Destination,
    appearing,
    check_replaceable,
    clear_leftovers,
    look_at,
    resolve,
)
from tests.fuzz.kills import Case, campaign, version, write

SYSTEMS = ("exchange", "renames")
ROUNDS = 20


@pytest.fixture(params=SYSTEMS)
def system(request, monkeypatch):
    """The system's own calls, and one that has none."""
    if request.param == "renames":
        monkeypatch.setattr(renames, "_system_call", lambda: None)
    return request.param


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def publish(out, text, *, overwrite=False, meanwhile=lambda: None):
    with appearing(check_replaceable(out, overwrite=overwrite)) as directory:
        write(directory, text)
        meanwhile()


class StoppedError(Exception):
    pass


def as_nobody(action, directories):
    """Root may write everywhere: in a child that is not."""
    nobody = 65534 if os.geteuid() == 0 else os.geteuid()
    for directory in directories:
        os.chown(directory, nobody, -1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setuid(nobody)
            action()
            status = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


class TestRenames:
    @pytest.fixture
    def place(self, tmp_path):
        directory = os.open(tmp_path, os.O_RDONLY)
        yield lambda name: (directory, name)
        os.close(directory)

    @pytest.mark.parametrize("there", ["file", "directory", "full", "link", "broken link"])
    def test_put_refuses_what_is_there(self, tmp_path, place, system, there):
        (tmp_path / "made" / "inner").mkdir(parents=True)
        target = tmp_path / "target"
        if there == "file":
            target.write_text("precious")
        elif there.endswith("link"):
            target.symlink_to("made" if there == "link" else "nowhere")
        else:
            target.mkdir()
            if there == "full":
                (target / "thesis.txt").write_text("precious")
        before = content_of(*reversed(place("target")))
        with pytest.raises(FileExistsError):
            renames.put(place("made"), place("target"))
        assert content_of(*reversed(place("target"))) == before
        assert (tmp_path / "made" / "inner").is_dir()

    def test_put_where_nothing_is(self, tmp_path, place, system):
        (tmp_path / "made").mkdir()
        renames.put(place("made"), place("target"))
        assert os.listdir(tmp_path) == ["target"]
        with pytest.raises(FileNotFoundError):
            renames.put(place("made"), place("another"))
        (tmp_path / "file").write_text("precious")
        with pytest.raises(FileExistsError):
            renames.put(place("file"), place("target"))
        renames.put(place("file"), place("moved"))
        assert sorted(os.listdir(tmp_path)) == ["moved", "target"]

    def test_a_plain_rename_never_replaces_what_is_made_at_the_last_moment(
        self, tmp_path, place, monkeypatch
    ):
        monkeypatch.setattr(renames, "_system_call", lambda: None)
        rename = os.rename

        def late(*arguments, **options):
            (tmp_path / "target").mkdir()
            (tmp_path / "target" / "thesis.txt").write_text("precious")
            rename(*arguments, **options)

        (tmp_path / "made").mkdir()
        monkeypatch.setattr(os, "rename", late)
        with pytest.raises(FileExistsError):
            renames.put(place("made"), place("target"))
        assert (tmp_path / "target" / "thesis.txt").read_text() == "precious"

    def test_exchange(self, tmp_path, place):
        (tmp_path / "one").mkdir()
        (tmp_path / "other").write_text("a file")
        renames.exchange(place("one"), place("other"))
        assert (tmp_path / "one").read_text() == "a file"
        assert (tmp_path / "other").is_dir()
        with pytest.raises(FileNotFoundError):
            renames.exchange(place("one"), place("nothing"))

    def test_a_filesystem_that_refuses(self, place, monkeypatch):
        monkeypatch.setattr(renames, "_system_call", lambda: None)
        with pytest.raises(renames.ExchangeError):
            renames.exchange(place("one"), place("other"))


class TestRaces:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_of_two_at_once_one_wins_and_the_other_is_told(self, out, system, overwrite):
        """And they leave nothing hidden."""
        for turn in range(ROUNDS):
            if overwrite:
                publish(out, "old", overwrite=True)
            else:
                out = out.with_name(f"out{turn}")
            barrier, told, won = threading.Barrier(2), [], []

            def run(text, out=out, barrier=barrier, told=told, won=won):
                try:
                    with appearing(check_replaceable(out, overwrite=overwrite)) as directory:
                        write(directory, text)
                        barrier.wait()
                    won.append(text)
                except DestinationError as error:
                    told.append(str(error))

            threads = [threading.Thread(target=run, args=(text,)) for text in ("one", "two")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == len(told) == 1, (won, told)
            assert "what was made for it is dropped" in told[0]
            assert version(out) == won[0]
        assert not list(out.parent.glob(".*"))

    def test_a_reader_never_sees_a_gap(self, out):
        publish(out, "0")
        stop, seen, gaps = threading.Event(), set(), []

        def read():
            while not stop.is_set():
                try:
                    seen.add((out / "config.json").read_text())
                except OSError as error:
                    gaps.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(1, ROUNDS):
            publish(out, str(number), overwrite=True)
        stop.set()
        reader.join()
        assert gaps == []
        assert len(seen) > 2

    def test_one_that_is_gone_meanwhile_needs_no_replacing(self, out, system):
        publish(out, "old")
        with appearing(check_replaceable(out, overwrite=True)) as directory:
            write(directory, "new")
            out.rename(out.with_name("moved"))
        assert version(out) == "new"
        assert sorted(os.listdir(out.parent)) == ["moved", "out"]

    @pytest.mark.parametrize(
        "change", ["written", "same size", "removed", "replaced", "bundle", "file"]
    )
    def test_only_what_was_there_is_replaced(self, out, system, change):
        publish(out, "old")
        file = out / "config.json"

        def disturb():
            if change == "written":
                file.write_text("longer")
            elif change == "same size":
                file.write_text("odd")
            elif change == "removed":
                file.unlink()
            elif change == "replaced":
                file.rename(file.with_name("other"))
                file.write_text("old")
            else:
                out.rename(out.with_name("moved"))
                write(out, "theirs") if change == "bundle" else out.write_text("precious")
            after.append(look_at(out))

        after = []
        with pytest.raises(DestinationError, match=r"changed while .* and stays as it is"):
            publish(out, "new", overwrite=True, meanwhile=disturb)
        assert [look_at(out)] == after
        assert not list(out.parent.glob(".*"))

    def test_what_the_finder_leaves_is_nobody_s(self, out):
        publish(out, "old")
        with appearing(check_replaceable(out, overwrite=True)) as directory:
            write(directory, "new")
            (out / ".DS_Store").write_text("")
        assert version(out) == "new"


class TestKilled:
    def test_every_kind_of_disturbance(self, tmp_path):
        """A part of the campaign; `python -m tests.fuzz` runs it long."""
        # In memory, where there is such a place: ten times faster.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
        with tempfile.TemporaryDirectory(dir=memory) as workdir:
            cases = list(campaign(120, 7, Path(workdir)))
            assert os.listdir(workdir) == []
        assert len(cases) == 120
        assert [(name, note) for name, good, note in cases if not good] == []

    def test_a_case_is_had_again_by_its_name(self):
        case = Case("replace", "exchange", (("file", "after", 12), ("kill", "before", 30)))
        assert Case.of(case.name) == case

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_in_the_middle(self, out, number):
        """By a signal, from outside, while the bundle is being written."""
        publish(out, "old")
        script = (
            "import sys, time, pathlib\n"
            "from model_export.destination.destination import appearing, check_replaceable\n"
            "from model_export.interruption import interruptible\n"
            "out = check_replaceable(pathlib.Path(sys.argv[1]), overwrite=True)\n"
            "with interruptible(lambda *a: None), appearing(out) as directory:\n"
            "    (directory / 'config.json').write_text('half')\n"
            "    print('there', flush=True)\n"
            "    time.sleep(60)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with process:
            assert process.stdout.readline() == b"there\n"
            # One that is alive is left alone.
            clear_leftovers(out.parent)
            (hidden,) = out.parent.glob(".*")
            assert (hidden / "bundle" / "config.json").read_text() == "half"
            process.send_signal(number)
        assert version(out) == "old"
        if number == signal.SIGKILL:
            assert hidden.is_dir()
            clear_leftovers(out.parent)
        assert os.listdir(out.parent) == ["out"]

    def test_what_only_looks_similar_stays(self, tmp_path, out):
        precious = tmp_path / "elsewhere" / "thesis.txt"
        precious.parent.mkdir()
        precious.write_text("precious")
        there = {
            ".fastvlm-0123456789abcde0": lambda path: path.symlink_to("elsewhere"),
            ".fastvlm-0123456789abcde1": lambda path: path.write_text("a file"),
            ".fastvlm-0123456789abcde2": lambda path: (path / "mine").mkdir(parents=True),
            ".fastvlm-0123456789abcde3": lambda path: (path / "lock").mkdir(parents=True),
            ".fastvlm-notes": lambda path: path.mkdir(),
            ".out.partial-abcdefgh": lambda path: path.mkdir(),
            ".out.replaced-abcdefgh": lambda path: path.mkdir(),
        }
        for name, make in there.items():
            make(tmp_path / name)
        publish(out, "new")
        assert sorted(os.listdir(tmp_path)) == sorted([*there, "elsewhere", "out"])

    def test_it_keeps_no_sweep_from_starting_again(self, tmp_path):
        killed(tmp_path)
        sweep._State.open(tmp_path, "digest")
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(DestinationError, match="was not made by a sweep"):
            sweep._State.open(tmp_path, "digest")

    def test_links_are_removed_and_not_followed(self, tmp_path, out):
        precious = tmp_path / "elsewhere" / "thesis.txt"
        precious.parent.mkdir()
        precious.write_text("precious")
        left = killed(tmp_path)
        (left / "bundle" / "folder").symlink_to(precious.parent)
        (left / "bundle" / "file").symlink_to(precious)
        (left / "bundle" / "locked").mkdir(mode=0o500)
        clear_leftovers(tmp_path)
        assert os.listdir(tmp_path) == ["elsewhere"]
        assert precious.read_text() == "precious"

    def test_a_record_that_leads_out_is_not_followed(self, tmp_path):
        left = killed(tmp_path / "folder")
        write(tmp_path / "victim", "old")
        record = {"destination": "../victim", "found": [], "made": []}
        (left / "record").write_text(json.dumps(record))
        clear_leftovers(tmp_path / "folder")
        assert left.is_dir()
        assert version(tmp_path / "victim") == "old"

    @pytest.mark.parametrize("alive", [True, False])
    def test_where_there_are_no_locks_the_process_is_looked_for(
        self, tmp_path, out, monkeypatch, alive
    ):
        def refuse(*arguments):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        number = os.getpid() if alive else self._dead()
        left = killed(tmp_path, owner=f"{number} {leftovers.platform.node()}")
        publish(out, "new")
        assert left.is_dir() == alive
        another = killed(tmp_path, owner="1 another machine")
        clear_leftovers(tmp_path)
        assert another.is_dir()

    @staticmethod
    def _dead():
        process = subprocess.Popen(["true"])
        process.wait()
        return process.pid


class TestModes:
    def test_all_are_what_the_umask_gives(self, out):
        earlier = os.umask(0o027)
        try:
            with appearing(Destination(out)) as directory:
                write(directory, "new")
                (directory / "config.json").chmod(0o600)
                (directory / "fastvithd.mlpackage").chmod(0o700)
                (directory / "link").symlink_to(__file__)
                before = os.stat(__file__).st_mode
        finally:
            os.umask(earlier)
        assert os.stat(__file__).st_mode == before
        paths = [p for p in [out, *out.rglob("*")] if not p.is_symlink()]
        modes = {(p.is_dir(), stat.S_IMODE(p.stat().st_mode)) for p in paths}
        assert modes == {(True, 0o750), (False, 0o640)}

    def test_files_are_synced_before_what_holds_them(self, out, monkeypatch):
        synced, fsync = [], os.fsync

        def record(fd):
            synced.append(os.stat(fd).st_ino)
            fsync(fd)

        monkeypatch.setattr(os, "fsync", record)
        publish(out, "new")
        inner = out / "fastvithd.mlpackage" / "Data"
        order = [inner / "weight.bin", inner, inner.parent, out, out.parent]
        places = [synced.index(path.stat().st_ino) for path in order]
        assert places == sorted(places)


class TestOneSentence:
    def test_a_disk_that_is_full_at_the_sync(self, out, monkeypatch):
        def full(fd):
            raise OSError(errno.ENOSPC, "No space left on device")

        publish(out, "old")
        with pytest.raises(DestinationError, match=r"the disk of .* is full"):
            publish(
                out, "new", overwrite=True, meanwhile=lambda: monkeypatch.setattr(os, "fsync", full)
            )
        assert version(out) == "old"
        assert os.listdir(out.parent) == ["out"]

    def test_names(self, tmp_path):
        for bad in ("\0", "a\ud800", "~nobody-of-this-name/x"):
            with pytest.raises(DestinationError, match="can't be a destination") as raised:
                resolve(bad)
            assert "\n" not in str(raised.value)
        with pytest.raises(DestinationError, match="too long"):
            check_replaceable(resolve(tmp_path / ("x" * 300)), overwrite=False)
        with pytest.raises(DestinationError, match="is where a disk is mounted"):
            check_replaceable(Path("/dev"), overwrite=True)

    def test_a_working_directory_that_is_gone(self, tmp_path, monkeypatch):
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
        with pytest.raises(DestinationError, match="can't be a destination"):
            resolve("out")

    @pytest.mark.parametrize("length", [250, 255])
    def test_a_long_name_has_room_beside_it(self, tmp_path, length):
        out = tmp_path / ("é" * (length // 2) + "x" * (length % 2))
        publish(out, "old")
        publish(out, "new", overwrite=True)
        assert version(out) == "new"

    def test_a_broken_link(self, out):
        out.symlink_to("nowhere")
        with pytest.raises(DestinationError, match="is a symbolic link"):
            resolve(out)
        with pytest.raises(DestinationError, match="exists"):
            check_replaceable(out, overwrite=False)
        with pytest.raises(DestinationError, match="expected a bundle"):
            check_replaceable(out, overwrite=True)
        assert out.is_symlink()

    def test_a_parent_that_is_a_link(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "models").symlink_to("disk")
        publish(tmp_path / "models" / "out", "new")
        assert version(tmp_path / "disk" / "out") == "new"

    def test_a_parent_that_leads_elsewhere_meanwhile(self, tmp_path):
        for name in ("disk", "other"):
            (tmp_path / name).mkdir()
        models = tmp_path / "models"
        models.symlink_to("disk")

        def redirect():
            models.unlink()
            models.symlink_to("other")

        with pytest.raises(DestinationError, match=r"was moved, removed or replaced"):
            publish(models / "out", "new", meanwhile=redirect)
        assert os.listdir(tmp_path / "disk") == os.listdir(tmp_path / "other") == []

    @pytest.mark.parametrize("away", ["moved", "removed"])
    def test_a_parent_that_goes_away_meanwhile(self, tmp_path, away):
        models = tmp_path / "models"
        models.mkdir()

        def go():
            if away == "moved":
                models.rename(tmp_path / "moved")
            else:
                shutil.rmtree(models)

        with pytest.raises(DestinationError) as raised:
            publish(models / "out", "new", meanwhile=go)
        assert "\n" not in str(raised.value)
        # Nothing hidden went along.
        assert away == "removed" or os.listdir(tmp_path / "moved") == []

    def test_a_parent_or_a_bundle_that_can_t_be_written_to(self):
        def refused():
            publish(out, "old")
            (out / "fastvithd.mlpackage").chmod(0o555)
            publish(out, "newer", overwrite=True)
            assert os.listdir(out.parent) == ["out"]
            out.chmod(0o555)
            with pytest.raises(DestinationError, match="is write-protected"):
                check_replaceable(out, overwrite=True)
            out.chmod(0o755)
            parent.chmod(0o555)
            with pytest.raises(DestinationError, match="Permission denied"):
                publish(out, "newest", overwrite=True)
            with pytest.raises(DestinationError, match="Permission denied"):
                publish(parent / "another" / "out", "newest")
            assert version(out) == "newer"

        with tempfile.TemporaryDirectory() as directory:
            parent = Path(directory) / "parent"
            parent.mkdir()
            out = parent / "out"
            as_nobody(refused, [parent.parent, parent])
            parent.chmod(0o755)


class TestParents:
    def test_those_that_were_made_go_with_what_failed(self, tmp_path):
        with suppress(StoppedError), appearing(Destination(tmp_path / "a" / "b" / "out")):
            raise StoppedError
        assert os.listdir(tmp_path) == []

    def test_those_of_others_stay(self, tmp_path):
        mine = tmp_path / "a"
        mine.mkdir()
        with suppress(StoppedError), appearing(Destination(mine / "b" / "c" / "out")):
            (mine / "b" / "thesis.txt").write_text("precious")
            raise StoppedError
        assert os.listdir(mine) == ["b"]
        assert os.listdir(mine / "b") == ["thesis.txt"]

    def test_one_that_somebody_made_first_stays(self, tmp_path, monkeypatch):
        mkdir = os.mkdir

        def late(path, *arguments, **options):
            if str(path).endswith("/a"):
                mkdir(path)
            mkdir(path, *arguments, **options)

        monkeypatch.setattr(os, "mkdir", late)
        with suppress(StoppedError), appearing(Destination(tmp_path / "a" / "out")):
            raise StoppedError
        assert os.listdir(tmp_path) == ["a"]
