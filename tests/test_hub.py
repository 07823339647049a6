"""Hub ids against a hub: a server on this machine that answers as huggingface.co does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

GOLDEN = Path(__file__).parent / "golden"
COMMIT = "c" * 40
LOCATE = "import sys; from model_export.hub import locate; print(*locate(sys.argv[1]), sep='\\n')"


@pytest.fixture
def hub():
    """Repositories by id, each a dict of files; what was asked for is in `served`."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.answer_api("/".join(parts[2:4]), parts[4:])
            else:
                self.answer_file("/".join(parts[:2]), "/".join(parts[4:]))

        do_HEAD = do_GET  # noqa: N815

        def answer_api(self, repository, rest):
            files = server.repositories.get(repository)
            if files is None:
                self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[:1] == ["tree"]:
                entries = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
                self.reply(200, json.dumps(entries).encode())
            elif rest not in (["revision", "main"], []):
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                info = {"id": repository, "sha": COMMIT, "siblings": []}
                self.reply(200, json.dumps(info).encode())

        def answer_file(self, repository, name):
            data = server.repositories[repository][name]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            if self.command == "GET":
                server.served.append(name)
            self.reply(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT})

        def reply(self, status, data, headers=()):
            self.send_response(status)
            for key, value in dict(headers).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.served = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def run(hub, tmp_path):
    def run(*command, **environment):
        cache = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        cache |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        return subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, **cache, **endpoint, **environment},
        )

    return run


def test_only_what_an_export_reads_is_fetched_and_once(hub, run):
    files = {p.name: p.read_bytes() for p in (GOLDEN / "transformers").iterdir()}
    more = ("optimizer.pt", "pytorch_model.bin", "onnx/model.safetensors", "training_args.bin")
    hub.repositories["owner/model"] = files | dict.fromkeys(more, b"not wanted")
    first = run("-c", LOCATE, "owner/model")
    assert first.returncode == 0, first.stderr
    folder, hub_id = first.stdout.splitlines()
    assert hub_id == f"owner/model@{COMMIT}"
    assert {p.name for p in Path(folder).iterdir()} == set(files)
    assert sorted(hub.served) == sorted(files)
    assert run("-c", LOCATE, "owner/model").stdout == first.stdout
    assert run("-c", LOCATE, "owner/model", HF_HUB_OFFLINE="1").stdout == first.stdout
    assert len(hub.served) == len(files)


def test_a_repository_of_pickles(hub, run):
    hub.repositories["owner/model"] = {
        "config.json": b"{}",
        "pytorch_model.bin": b"1",
        "x.bin": b"",
    }
    folder = run("-c", LOCATE, "owner/model@main").stdout.splitlines()[0]
    assert {p.name for p in Path(folder).iterdir()} == {"config.json", "pytorch_model.bin"}


@pytest.mark.parametrize(
    ("reference", "environment", "words"),
    [
        ("owner/nothing", {}, "owner/nothing is neither a directory here nor a repository on"),
        ("owner/model@v9", {}, "the hub's owner/model has no revision v9"),
        ("owner/model", {"HF_HUB_OFFLINE": "1"}, "go online once to download it, or give a"),
        ("owner/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub can't be reached: go"),
    ],
)
def test_what_fails_is_one_sentence(hub, run, tmp_path, reference, environment, words):
    hub.repositories["owner/model"] = {"config.json": b"{}"}
    done = run("-m", "fastvlm_mlx", "export", reference, tmp_path / "out", **environment)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
