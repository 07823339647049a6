"""Apple's archives: resumed, checked, unpacked; a server on this machine stands for Apple's."""

import errno
import io
import os
import shutil
import stat
import zipfile
from functools import partial

import httpx2
import pytest
from hub_server import HubServer

from fastvlm_mlx.errors import CheckpointError, DestinationError
from fastvlm_mlx.models import archive, cache
from fastvlm_mlx.models.names import PUBLISHED
from fastvlm_mlx.models.resolve import resolve
from model_export.checkpoint import hub as checkpoint_hub

STAGE2 = PUBLISHED["fastvlm-0.5b-stage2"]
APP = PUBLISHED["fastvlm-0.5b-fp16"]


def zipped(directory, top, **more):
    """An archive as Apple makes one, a Mac's litter included."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as found:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                found.write(path, f"{top}/{path.relative_to(directory)}")
        found.writestr(f"__MACOSX/{top}/._config.json", "")
        for name, content in more.items():
            found.writestr(name, content)
    return stream.getvalue()


@pytest.fixture
def server(monkeypatch):
    """Serves what is in `files` by name, as Apple's does."""
    server = HubServer()
    server.files = server.repositories.setdefault("data/fastvlm", {})
    monkeypatch.setattr(archive, "ARCHIVES", f"{server.url}/data/fastvlm/resolve/main")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()


@pytest.fixture
def stage2(server, demo_checkpoint):
    data = zipped(demo_checkpoint, STAGE2.archive)
    server.files[f"{STAGE2.archive}.zip"] = data
    return data


def interrupted(data):
    """Leave a download that was cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "_unpack", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            archive.entry(STAGE2)
    (file,) = cache.directory().glob("*/partial/archive.zip")
    file.write_bytes(data[: len(data) // 2])
    return file


def test_a_checkpoint_s_archive_is_unpacked_and_kept(server, stage2, demo_checkpoint, capsys):
    path, hub_id = checkpoint_hub.locate("FastVLM-0.5B-stage2")
    assert hub_id is None
    assert path.name == STAGE2.archive
    names = {p.relative_to(path) for p in path.rglob("*")}
    assert names == {p.relative_to(demo_checkpoint) for p in demo_checkpoint.rglob("*")}
    weights = "model.safetensors"
    assert (path / weights).read_bytes() == (demo_checkpoint / weights).read_bytes()
    said = capsys.readouterr().err
    assert said.count("downloading http") == 1
    assert " MB in " in said
    server.files.clear()
    assert checkpoint_hub.locate("fastvlm-0.5b-stage2")[0] == path


def test_apple_s_bundle_runs_without_the_exporter(server, demo_bundle):
    server.files[f"{APP.archive}.zip"] = zipped(demo_bundle, APP.archive)
    path = resolve("fastvlm-0.5b-fp16")
    assert (path / "fastvithd.mlpackage" / "Manifest.json").is_file()
    with pytest.raises(CheckpointError, match="is a bundle: expected a checkpoint"):
        checkpoint_hub.locate("fastvlm-0.5b-fp16")


class TestResuming:
    @pytest.fixture(autouse=True)
    def cut(self, server, stage2, monkeypatch):
        self.file = interrupted(stage2)
        self.sent = []
        reply = server.RequestHandlerClass.reply

        def noted(handler, status, content, headers=()):
            self.sent.append((status, len(content)))
            reply(handler, status, content, headers)

        monkeypatch.setattr(server.RequestHandlerClass, "reply", noted)

    def test_only_the_rest_is_fetched(self, stage2):
        archive.entry(STAGE2)
        assert self.sent == [(206, len(stage2) - len(stage2) // 2)]

    def test_another_archive_is_fetched_anew(self, server, demo_checkpoint):
        data = zipped(demo_checkpoint, STAGE2.archive, **{f"{STAGE2.archive}/new.json": "{}"})
        server.files[f"{STAGE2.archive}.zip"] = data
        assert (archive.entry(STAGE2).path / "new.json").exists()
        assert self.sent == [(200, len(data))]

    def test_what_was_whole_is_not_fetched_again(self, stage2):
        self.file.write_bytes(stage2)
        archive.entry(STAGE2)
        assert self.sent == []

    def test_damage_is_found_and_fetched_anew(self, stage2):
        self.file.write_bytes(bytes(1000) + stage2[1000 : len(stage2) // 2])
        with pytest.raises(CheckpointError, match=r"arrived damaged .* downloads it anew"):
            archive.entry(STAGE2)
        assert archive.entry(STAGE2).path.is_dir()

    def test_one_that_changes_between_its_halves(self, server, stage2, monkeypatch):
        """Its server goes on with another archive in place of beginning anew."""
        reply = server.RequestHandlerClass.reply
        monkeypatch.setattr(
            server.RequestHandlerClass,
            "reply",
            lambda handler, status, content, headers=(): reply(
                handler, status, content, {**dict(headers), "ETag": '"another"'}
            ),
        )
        with pytest.raises(CheckpointError, match=r"has changed since .* downloads it anew"):
            archive.entry(STAGE2)
        assert list(cache.directory().iterdir()) == []
        assert archive.entry(STAGE2).path.is_dir()

    def test_one_that_has_become_longer(self, server, stage2, monkeypatch):
        size = len(stage2) + 7
        reply = server.RequestHandlerClass.reply

        def longer(handler, status, content, headers=()):
            headers = dict(headers)
            if status == 206:
                headers["Content-Range"] = headers["Content-Range"].rpartition("/")[0] + f"/{size}"
            reply(handler, status, content, headers)

        monkeypatch.setattr(server.RequestHandlerClass, "reply", longer)
        with pytest.raises(CheckpointError, match="has changed since"):
            archive.entry(STAGE2)

    def test_a_part_that_is_too_long_is_fetched_anew(self, stage2):
        self.file.write_bytes(stage2 + b"more")
        assert archive.entry(STAGE2).path.is_dir()

    def test_a_server_that_has_no_such_part(self, server, monkeypatch):
        file = server.RequestHandlerClass.get_file
        monkeypatch.setattr(
            server.RequestHandlerClass, "get_file", lambda handler, *_: handler.reply(416, {})
        )
        with pytest.raises(CheckpointError, match="has changed since"):
            archive.entry(STAGE2)
        monkeypatch.setattr(server.RequestHandlerClass, "get_file", file)
        assert archive.entry(STAGE2).path.is_dir()


def link(target):
    member = zipfile.ZipInfo(f"{STAGE2.archive}/link")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return {member: target}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no archive", "arrived damaged"),
        ({"../escaped": ""}, r"holds \.\./escaped, which is no file below"),
        ({"/escaped": ""}, "which is no file below"),
        (link("/etc"), "which is no file below"),
        ({"readme.txt": ""}, "holds 0 directories with a config.json"),
        ({"a/config.json": "{}", "b/config.json": "{}"}, "holds 2 directories"),
        ({"m": "", "m/config.json": "{}"}, "arrived damaged .*File exists"),
        ({f"m/{'n' * 300}": "", "m/config.json": "{}"}, "arrived damaged .*too long"),
    ],
)
def test_an_archive_of_something_else(server, content, words, tmp_path):
    if not isinstance(content, bytes):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as found:
            for name, text in content.items():
                found.writestr(name, text)
        content = stream.getvalue()
    server.files[f"{STAGE2.archive}.zip"] = content
    with pytest.raises(CheckpointError, match=words):
        archive.entry(STAGE2)
    assert list(cache.directory().iterdir()) == []
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_damage_anywhere_is_one_sentence(method, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_check_room", lambda needed: None)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as found:
        found.writestr("m/config.json", '{"some": "text", "and": "text"}')
        found.writestr("m/weights", bytes(range(90)))
    whole = stream.getvalue()
    file, target = tmp_path / archive._FILE, tmp_path / "target"
    refused = 0
    for at in range(0, len(whole), 3):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1 :]):
            file.write_bytes(damaged)
            try:
                archive._unpack("URL", tmp_path, target)
            except CheckpointError:
                refused += 1
                assert not file.exists()
            else:
                # The damage is in what nobody reads, a date for example.
                assert (target / "config.json").read_text().startswith('{"some": "text"')
                shutil.rmtree(target)
    assert refused > len(whole) / 2


def test_a_file_that_is_shorter_than_the_archive_says(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as found:
        found.writestr("m/config.json", "{}")
        found.filelist[0].file_size = 1000
    (tmp_path / archive._FILE).write_bytes(stream.getvalue())
    cache.directory().mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has another size"):
        archive._unpack("URL", tmp_path, tmp_path / "target")


def test_what_can_t_be_resumed_does_not_stay(server, stage2, monkeypatch):
    """A server that names no version of what it sends, and breaks off."""
    reply = server.RequestHandlerClass.reply

    def broken(handler, status, content, headers=()):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        handler.close_connection = True

    monkeypatch.setattr(server.RequestHandlerClass, "reply", broken)
    with pytest.raises(CheckpointError, match="it resumes"):
        archive.entry(STAGE2)
    assert list(cache.directory().iterdir()) == []
    monkeypatch.setattr(server.RequestHandlerClass, "reply", reply)
    assert archive.entry(STAGE2).path.is_dir()


def test_a_full_disk_while_it_is_unpacked_keeps_the_download_alone(stage2, monkeypatch):
    def full(source, stream, length):
        stream.write(source.read(10))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", full)
        with pytest.raises(DestinationError, match="is full"):
            archive.entry(STAGE2)
    (partial,) = cache.directory().glob("*/partial")
    assert {path.name for path in partial.iterdir()} == {"archive.zip", "archive.json"}
    assert archive.entry(STAGE2).path.is_dir()


def test_a_way_that_others_can_change(server, stage2, monkeypatch):
    monkeypatch.setattr(
        httpx2, "stream", partial(redirected, httpx2.stream, server.url + "/data/fastvlm/resolve")
    )
    monkeypatch.setattr(archive, "ARCHIVES", "https://archives")
    with pytest.raises(CheckpointError, match="without https"):
        archive.entry(STAGE2)
    assert cache.entries() == []


def redirected(stream, base, method, url, **options):
    """As if the https address had led there."""
    return stream(method, url.replace("https://archives", f"{base}/main"), **options)


def test_a_proxy_that_needs_a_package(server, stage2, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy")
    with pytest.raises(CheckpointError, match=r"can't be downloaded"):
        archive.entry(STAGE2)


def test_one_that_is_not_there(server):
    with pytest.raises(CheckpointError, match="HTTP 404"):
        archive.entry(STAGE2)


def test_no_server(monkeypatch):
    monkeypatch.setattr(archive, "ARCHIVES", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"can't be downloaded .* go online"):
        archive.entry(STAGE2)


def test_a_disk_without_room(server, stage2, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DestinationError, match=r"has 1\.0 kB left, and .* are needed"):
        archive.entry(STAGE2)
