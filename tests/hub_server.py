"""A hub on this machine: answers huggingface_hub as huggingface.co does, downloads and uploads."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
WRITES, READS = "hf_writes", "hf_reads"
# Kept as large files, as the hub's default `.gitattributes` does.
LARGE = (".safetensors", ".bin", ".mlmodel")


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Attributes:
    repositories: files by name, by repository's id; another branch's by `id@branch`.
    private: the ids that only their owner sees.
    served: names of the files that were downloaded.
    large: uploaded large files by SHA-256; they outlive a commit that failed.
    puts: their SHA-256, in the order of arrival.
    commits: of each, its message and its deletions.
    failing: status to answer with, by the last word but one of a path (`commit`, `large`).
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.private, self.large, self.failing = {}, set(), {}, {}
        self.served, self.puts, self.commits = [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self):
        parts = self.parts()
        if parts[:2] == ["api", "models"]:
            self.get_api("/".join(parts[2:4]), parts[4:])
        else:
            self.get_file("/".join(parts[:2]), "/".join(parts[4:]))

    do_HEAD = do_GET  # noqa: N815

    def get_api(self, repository, rest):
        branch = rest[1] if rest else "main"
        key = repository if branch in ("main", COMMIT) else f"{repository}@{branch}"
        files = self.server.repositories.get(key)
        if repository not in self.server.repositories:
            self.reply(404, {}, {"X-Error-Code": "RepoNotFound"})
        elif files is None:
            self.reply(404, {}, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
            self.reply(200, entries)
        else:
            siblings = [sibling(name, data) for name, data in files.items()]
            private = repository in self.server.private
            info = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": private}
            self.reply(200, info)

    def get_file(self, repository, name):
        data = self.server.repositories.get(repository, {}).get(name)
        if data is None:
            self.reply(404, {}, {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.served.append(name)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.reply(206, data[first : last + 1], headers)
        else:
            self.reply(200, data, headers)

    def do_POST(self):
        parts, body = self.parts(), self.body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if parts == ["api", "validate-yaml"]:
            self.validate(json.loads(body))
        elif token not in (WRITES, READS):
            self.reply(401, {"error": "Invalid username or password."})
        elif token == READS:
            self.reply(403, {"error": "You don't have the rights"})
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            self.batch(json.loads(body))
        elif status := self.server.failing.get(parts[-2]):
            self.reply(status, {"error": "as the test asks"})
        else:
            repository, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
            files = repository if revision == "main" else f"{repository}@{revision}"
            getattr(self, action)(files, body)

    def create(self, wanted):
        repository = f"{wanted['organization']}/{wanted['name']}"
        exists = repository in self.server.repositories
        if not exists:
            self.server.repositories[repository] = {".gitattributes": b"*.bin filter=lfs\n"}
            if wanted.get("visibility") == "private":
                self.server.private.add(repository)
        self.reply(409 if exists else 200, {"url": f"{self.server.url}/{repository}"})

    def branch(self, key, body):
        exists = key in self.server.repositories
        if not exists:
            main = self.server.repositories[key.partition("@")[0]]
            self.server.repositories[key] = dict(main)
        self.reply(409 if exists else 200, {})

    def validate(self, asked):
        from huggingface_hub import ModelCard

        head = ModelCard(asked["content"]).data
        wrong = [key for key in ("license", "pipeline_tag") if not isinstance(head.get(key), str)]
        errors = [{"message": f'"{key}" must be a string'} for key in wrong]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, key, body):
        files = self.server.repositories[key]
        answer = []
        for file in json.loads(body)["files"]:
            name = file["path"]
            mode, hashed = ("lfs", sha256) if name.endswith(LARGE) else ("regular", git_hash)
            there = {"oid": hashed(files[name])} if name in files else {}
            answer.append({"path": name, "uploadMode": mode, "shouldIgnore": False, **there})
        self.reply(200, {"files": answer})

    def batch(self, asked):
        objects = []
        for item in asked["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/large/{item['oid']}"}}
            new = item["oid"] not in self.server.large
            objects.append({**item, **({"actions": upload} if new else {})})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def do_PUT(self):
        oid, data = self.parts()[1], self.body()
        if status := self.server.failing.get("large"):
            self.reply(status, {})
            return
        assert sha256(data) == oid
        self.server.large[oid] = data
        self.server.puts.append(oid)
        self.reply(200, {})

    def commit(self, key, body):
        header, *operations = map(json.loads, body.splitlines())
        files = dict(self.server.repositories[key])
        deleted = []
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
                deleted.append(value["path"])
        self.server.repositories[key] = files
        self.server.commits.append((header["value"]["summary"], deleted))
        url = f"{self.server.url}/{key}/commit/{COMMIT}"
        self.reply(200, {"commitUrl": url, "commitOid": COMMIT})

    def parts(self):
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def reply(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def sibling(name, data):
    """A file as a list with `blobs=True` shows it."""
    large = {"lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 134}}
    return {
        "rfilename": name,
        "size": len(data),
        "blobId": git_hash(data),
        **(large if name.endswith(LARGE) else {}),
    }
