"""Files of somebody else's: what is opened, what is refused, and how both are told."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm_mlx.bundle.files import inside, listing, read_bytes
from fastvlm_mlx.bundle.schema import parse, to_json
from fastvlm_mlx.errors import BundleError, CheckpointError, FastVLMError, printable
from fastvlm_mlx.vision.units import read_record
from model_export.layouts.rules import read_headers, read_object


@pytest.fixture
def root(tmp_path):
    (tmp_path / "secret").write_text("precious")
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text("{}")
    return root


def link(root, target):
    (root / "link").symlink_to(target)
    return root / "link"


class TestLinks:
    @pytest.mark.parametrize("target", ["../secret", "/dev/zero", "../model/../secret"])
    def test_one_that_leads_out_is_not_followed(self, root, target):
        file = link(root, target)
        with pytest.raises(CheckpointError, match="is a link that leads out of"):
            read_bytes(root, file, CheckpointError)

    def test_one_inside_is(self, root):
        assert read_bytes(root, link(root, "config.json"), CheckpointError) == b"{}"

    def test_one_through_a_directory_that_is_a_link(self, root):
        (root / "folder").symlink_to("..")
        with pytest.raises(CheckpointError, match="leads out of"):
            inside(root, root / "folder" / "secret", CheckpointError)
        assert listing(root, CheckpointError) == ["config.json", "folder"]

    def test_the_hub_s_cache_is_one_place(self, tmp_path):
        """Its snapshots are links to blobs, and a package in it is a folder of such links."""
        repository = tmp_path / "models--owner--name"
        package = repository / "snapshots" / "0123" / "a.mlpackage"
        package.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "blobs" / "ab").write_text("of the hub")
        (package / "Manifest.json").symlink_to("../../../blobs/ab")
        for root in (package, package.parent):
            data = read_bytes(root, package / "Manifest.json", CheckpointError)
            assert data == b"of the hub"
        other = tmp_path / "models--owner--other" / "blobs"
        other.mkdir(parents=True)
        (other / "cd").write_text("of another")
        (package / "weights").symlink_to(other / "cd")
        with pytest.raises(CheckpointError, match="leads out of"):
            inside(package, package / "weights", CheckpointError)

    def test_a_loop(self, root):
        with pytest.raises(CheckpointError, match="can't be opened"):
            inside(root, link(root, "link"), CheckpointError)


class TestKinds:
    def test_a_pipe_is_refused_and_not_waited_for(self, root):
        os.mkfifo(root / "pipe")
        with pytest.raises(CheckpointError, match="is a device, a pipe or a socket"):
            read_bytes(root, root / "pipe", CheckpointError)

    def test_a_socket(self, root, monkeypatch):
        monkeypatch.chdir(root)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
            with pytest.raises(CheckpointError, match="a socket"):
                read_bytes(root, root / "socket", CheckpointError)

    def test_a_directory(self, root):
        (root / "folder").mkdir()
        with pytest.raises(CheckpointError, match="is a directory"):
            read_bytes(root, root / "folder", CheckpointError)

    def test_a_large_one(self, root):
        (root / "large").write_bytes(b"12345")
        assert read_bytes(root, root / "large", CheckpointError, 5) == b"12345"
        with pytest.raises(CheckpointError, match="has more than 4 bytes"):
            read_bytes(root, root / "large", CheckpointError, 4)

    @pytest.mark.parametrize("name", ["nothing", "a\0b", "n" * 300])
    def test_no_such_file(self, root, name):
        with pytest.raises(CheckpointError, match="can't be opened"):
            read_bytes(root, root / name, CheckpointError)


def test_what_systems_leave_behind_is_not_listed(root):
    for name in ("._config.json", ".DS_Store", "Thumbs.db", ".git/config", ".cache/hub/x.lock"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("left")
    assert listing(root, BundleError) == ["config.json"]


JSON_OF_SOMEBODY_ELSE = [
    b"",
    b"[",
    b"[]",
    b"3",
    b"null",
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": "\xff"}',
    b'{"a": ' * 100_000,
    b'{"a": ' * 70 + b"1" + b"}" * 70,
    b"[" * 100_000 + b"]" * 100_000,
    b"\x00",
]


@pytest.mark.parametrize("data", JSON_OF_SOMEBODY_ELSE, ids=range(len(JSON_OF_SOMEBODY_ELSE)))
def test_json_that_is_none_is_one_sentence(data):
    with pytest.raises(BundleError, match=r"^f\.json .*: get it again$"):
        parse(data, "f.json", BundleError, remedy="get it again")


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_one_error(data):
    with suppress(BundleError):
        assert isinstance(parse(data, "f.json", BundleError, remedy="get it again"), dict)


@given(st.text())
def test_what_is_printed_of_somebody_else_s_text(text):
    shown = printable(text, 50)
    assert shown.isprintable()
    assert len(shown) <= 50
    assert str(FastVLMError(text)) == printable(text)


def test_escapes_and_directions_are_shown_and_not_obeyed():
    error = FastVLMError("a\x1b[31m\nb \u202e\u2028 c \ud800")
    assert str(error) == r"a\x1b[31m b \u202e c \ud800"
    assert Path(str(error)).name


def test_what_is_written_is_read_by_everybody():
    data = {"figures": [float("nan"), {"snr_db": float("-inf")}, 1.5], "name": "caf\udce9"}
    text = to_json(data).encode()
    with pytest.raises(BundleError):
        parse(b'{"a": NaN}', "it", BundleError, remedy="")
    assert json.loads(text) == {**data, "figures": [None, {"snr_db": None}, 1.5]}
    assert parse(to_json({"a": float("inf")}).encode(), "it", BundleError, remedy="") == {"a": None}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5_000, "\xff"])
def test_json_that_is_nested_too_deeply_anywhere(tmp_path, text):
    """Of a weight file's header, and of what the cache keeps: Python's parser runs out of stack."""
    data = text.encode("latin1")
    (tmp_path / "a.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(BundleError, match="not a whole safetensors file"):
        read_headers(tmp_path)
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(BundleError, match="read as JSON"):
        read_object(tmp_path, "config.json")
    assert read_record(tmp_path / "config.json") is None
