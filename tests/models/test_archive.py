"""Apple's archives: resumed, checked, unpacked; a server on this machine stands for Apple's."""

import io
import shutil
import stat
import zipfile

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
    assert cache.entries() == []
    assert not list(tmp_path.rglob("escaped"))


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
