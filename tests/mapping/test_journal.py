"""The file of rows: killed at any byte it can be gone on with, and nobody else's is touched."""

import errno
import os
import resource
from contextlib import contextmanager

import msgspec
import pytest

from fastvlm_mlx.errors import DestinationError, ImageError
from fastvlm_mlx.mapping import journal, rows
from fastvlm_mlx.mapping.rows import Row

MADE_OF = {"prompt": "Describe the image.", "max_tokens": 4, "folder": "/caf\udce9"}
ROWS = [
    Row(image="a.png", text="A \u2028 line\nand more.", finish_reason="stop", prompt_tokens=3),
    Row(image="b\n.png", error="b is not an image: give another"),
    Row(image="caf\ufffd.png", image_bytes="636166e92e706e67", text="É"),
]
LINES = [rows.line(row) for row in ROWS]
WHOLE = b"".join(LINES)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "captions.jsonl"


def add(path, added=(), *, overwrite=False, made_of=MADE_OF):
    """Open, add rows, close; and what was done before."""
    with journal.opened(path, made_of, overwrite=overwrite) as written:
        before = dict(written.done)
        for row in added:
            written.write(row)
        written.begin()
        written.sync()
    return before


def test_rows_come_back_as_they_were_written(path):
    assert add(path, ROWS) == {}
    assert path.read_bytes() == WHOLE
    assert WHOLE.count(b"\n") == len(ROWS)
    assert [rows.read(line) for line in LINES] == ROWS
    assert add(path) == {"a.png": False, "b\n.png": True, "caf\udce9.png": False}
    assert path.read_bytes() == WHOLE


@pytest.mark.linux
@pytest.mark.parametrize("raw", ["é.png".encode(), b"\xe9.png"])
def test_a_name_is_the_same_where_the_system_has_another_encoding(monkeypatch, raw):
    name = raw.decode("latin-1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsencode", lambda name: name.encode("latin-1"))
        patched.setattr(os, "fsdecode", lambda raw: raw.decode("latin-1"))
        row = rows.failed(name, ImageError("no"))
        assert row.name == name
    assert os.fsencode(row.name) == raw
    assert rows.read(rows.line(row)).name == row.name


def test_cut_at_any_byte_it_is_gone_on_with(path, capsys, monkeypatch):
    add(path, ROWS[:2])
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for end in range(1, len(LINES[0] + LINES[1]) + 1):
        path.write_bytes(WHOLE[:end])
        # A row is whole without the end of its line.
        whole = [
            n
            for n, last in (("a.png", 1), ("b\n.png", 2))
            if end >= len(b"".join(LINES[:last])) - 1
        ]
        with journal.opened(path, MADE_OF, overwrite=False) as written:
            written.begin()
            assert list(written.done) == whole
            for row in ROWS:
                if row.name not in written.done:
                    written.write(row)
        assert path.read_bytes() == WHOLE
    assert "its image is asked about again" in capsys.readouterr().err


@pytest.mark.parametrize("tail", [b"\0" * 5, b'{"image":"c\0\0', b'{"ima'])
def test_what_a_lost_power_leaves_is_cut_off_too(path, tail):
    add(path, ROWS[:1])
    with path.open("ab") as stream:
        stream.write(tail)
    assert add(path, ROWS[1:]) == {"a.png": False}
    assert path.read_bytes() == WHOLE


class TestSomebodyElses:
    """It stays, byte by byte, and nothing comes to lie beside it."""

    def refused(self, path, match, **options):
        before = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
        with pytest.raises(DestinationError, match=match):
            add(path, ROWS, **options)
        assert before == {f.name: f.read_bytes() for f in path.parent.iterdir() if f.is_file()}

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("content", [WHOLE, b'{"image":"a', b"my notes"])
    def test_without_what_says_who_made_it(self, path, content, overwrite):
        path.write_bytes(content)
        self.refused(path, "nothing beside it", overwrite=overwrite)

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("content", [b"my notes", b'{"id": 1}\n', b'{"image": 1}\n', b"\n"])
    def test_put_in_the_place_of_ours(self, path, content, overwrite):
        add(path, ROWS)
        path.write_bytes(LINES[0] + content)
        self.refused(path, "no row of", overwrite=overwrite)

    @pytest.mark.parametrize("content", [b"#!/bin/sh\n", b"[]", b'{"made_by": "me"}'])
    def test_where_ours_would_say_what_made_it(self, path, content):
        path.with_name("captions.jsonl.run").write_bytes(content)
        self.refused(path, r"captions.jsonl.run is not what a run")
        path.write_bytes(WHOLE)
        self.refused(path, r"captions.jsonl.run is not what a run", overwrite=True)

    def test_no_file(self, path, tmp_path):
        (tmp_path / "other.jsonl").write_bytes(WHOLE)
        path.symlink_to("other.jsonl")
        self.refused(path, "is a symbolic link")
        path.unlink()
        path.mkdir()
        self.refused(path, "is a directory")
        path.rmdir()
        os.mkfifo(path)
        self.refused(path, "is a device, a pipe or a socket")

    def test_made_of_something_else(self, path):
        add(path, ROWS)
        other = MADE_OF | {"prompt": "Why?"}
        self.refused(path, 'with prompt "Describe the image.", not "Why\\?"', made_of=other)
        self.refused(path, "with max tokens 4, not 5", made_of=MADE_OF | {"max_tokens": 5})
        assert add(path, ROWS[:1], made_of=other, overwrite=True) == {}
        assert path.read_bytes() == LINES[0]
        self.refused(path, 'with prompt "Why\\?"')
        assert add(path, made_of=other) == {"a.png": False}

    def test_written_to_or_removed_meanwhile(self, path):
        with journal.opened(path, MADE_OF, overwrite=False) as written:
            written.write(ROWS[0])
            with path.open("ab") as stream:
                stream.write(b"mine\n")
            with pytest.raises(DestinationError, match="was written to by something else"):
                written.write(ROWS[1])
        assert path.read_bytes() == LINES[0] + b"mine\n"
        path.unlink()
        with journal.opened(path, MADE_OF, overwrite=False) as written:
            written.write(ROWS[0])
            path.unlink()
            with pytest.raises(DestinationError, match="was removed or replaced"):
                written.write(ROWS[1])


def test_one_run_at_a_time(path):
    with journal.opened(path, MADE_OF, overwrite=False) as written:
        for _ in range(2):
            with pytest.raises(DestinationError, match="another run is adding rows"):
                add(path, overwrite=True)
            written.write(ROWS[0])
    assert add(path) == {"a.png": False}


def test_what_is_not_begun_leaves_nothing_and_takes_nothing(path, tmp_path):
    with journal.opened(path, MADE_OF, overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == []
    add(path, ROWS)
    with journal.opened(path, MADE_OF, overwrite=True) as written:
        assert written.done == {}
    assert path.read_bytes() == WHOLE


def test_a_killed_beginning_is_begun_again(path):
    for said in (b"", b'{\n  "made_by": "fas'):
        path.with_name("captions.jsonl.run").write_bytes(said)
        path.write_bytes(b"")
        assert add(path, ROWS) == {}
        assert path.read_bytes() == WHOLE
        path.unlink()


@contextmanager
def room(size):
    """Files can't grow beyond that many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_tears_nothing(path):
    sentence = "all rows that it has are whole: make room, and give the same command again"
    with journal.opened(path, MADE_OF, overwrite=False) as written:
        written.write(ROWS[0])
        with room(len(LINES[0]) + 10), pytest.raises(DestinationError, match=sentence):
            written.write(ROWS[1])
        assert path.read_bytes() == LINES[0]
        assert list(written.done) == ["a.png"]
    assert add(path, ROWS[1:]) == {"a.png": False}
    assert path.read_bytes() == WHOLE


def test_an_interruption_tears_nothing(path, monkeypatch):
    write = os.write
    with journal.opened(path, MADE_OF, overwrite=False) as written:
        written.write(ROWS[0])

        def half(file, data):
            write(file, data[:10])
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(KeyboardInterrupt):
            written.write(ROWS[1])
        monkeypatch.undo()
        assert path.read_bytes() == LINES[0]


def test_a_disk_without_locks_says_so(path, monkeypatch, capsys):
    def refused(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    add(path, ROWS)
    assert "has no locks: see to it" in capsys.readouterr().err
    assert path.read_bytes() == WHOLE


def test_every_row_has_the_same_keys():
    keys = set(Row.__struct_fields__) - {"image_bytes", "json"}
    assert set(msgspec.json.decode(LINES[0])) == set(msgspec.json.decode(LINES[1])) == keys
    assert set(msgspec.json.decode(LINES[2])) == keys | {"image_bytes"}


def test_what_came_beside_the_rows_meanwhile_stays(path):
    beside = path.with_name(f"{path.name}.run")
    with journal.opened(path, MADE_OF, overwrite=False):
        beside.unlink()
        beside.write_text("another's")
    assert beside.read_text() == "another's"
