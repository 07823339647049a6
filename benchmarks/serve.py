"""A server under many clients: seconds to the first token, tokens a second, memory, wrong answers.

    python -m benchmarks.serve BUNDLE [--clients 16] [--seconds 120] [--peer PYTHON] [--json FILE]

Each client asks one question after the other, about scenes that are drawn for it, and reads the
answer as a stream. Every answer is compared with what the bundle answers alone, in this process.
With `--peer`, a Python that has mlx-vlm, its server gets the same clients after ours, where BUNDLE
is of layout mlx. How many of its answers differ from ours is told: it may round in other ways.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import fastvlm_mlx
from benchmarks.encoder import machine
from model_export.samples import scenes

MAX_TOKENS = 64
SCENES = 24


@dataclass(frozen=True)
class Asked:
    """A request, and the text that answers it."""

    messages: list[dict[str, Any]]
    text: str


@dataclass
class Load:
    """What clients have seen of a server.

    Attributes:
        memory: of its process, resident bytes, once a second.
    """

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: int = 0
    failed: int = 0
    memory: list[int] = field(default_factory=list)

    def report(self, seconds: float) -> dict[str, Any]:
        cuts = quantiles(self.first_s, n=20) if len(self.first_s) > 1 else [0.0] * 19
        quarter = len(self.memory) // 4
        return {
            "answers": len(self.whole_s),
            "wrong": self.wrong,
            "failed": self.failed,
            "answers_per_s": len(self.whole_s) / seconds,
            "tokens_per_s": self.tokens / seconds,
            "ttft_p50_s": cuts[9],
            "ttft_p95_s": cuts[18],
            "memory_after_a_quarter": self.memory[quarter] if self.memory else 0,
            "memory_at_the_end": self.memory[-1] if self.memory else 0,
        }


def questions(bundle: Path) -> list[Asked]:
    """Scenes with the answers of the bundle alone."""
    model = fastvlm_mlx.load(bundle)
    asked = []
    for scene, question in scenes.held_out(SCENES):
        image = scene.draw(256)
        file = io.BytesIO()
        image.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question.prompt},
        ]
        text = model.generate(image, question.prompt, max_tokens=MAX_TOKENS).text
        asked.append(Asked([{"role": "user", "content": content}], text))
    return asked


@contextmanager
def ours(bundle: Path) -> Iterator[tuple[int, int]]:
    """The process and the port of a server that answers."""
    command = [sys.executable, "-m", "fastvlm_mlx", "serve", str(bundle), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--name", str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        said = process.stdout.readline() if process.stdout else ""
        found = re.search(r"127\.0\.0\.1:(\d+)", said)
        if found is None:
            raise SystemExit("fastvlm's server has ended before it answered")
        yield process.pid, int(found[1])
    finally:
        process.terminate()
        process.wait()


@contextmanager
def theirs(python: str, bundle: Path) -> Iterator[tuple[int, int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = Path(__file__).parent / "peers" / "serve_mlx_vlm.py"
    process = subprocess.Popen(
        [python, str(script), str(bundle), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit("mlx-vlm's server has ended before it answered")
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def ask(port: int, model: str, asked: Asked, load: Load, lock: threading.Lock) -> None:
    body = {
        "model": model,
        "messages": asked.messages,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, text, tokens = time.perf_counter(), 0.0, "", 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        failed = response.status != 200
        for line in response:
            if failed or not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            failed = failed or "error" in chunk
            for choice in chunk.get("choices") or []:
                piece = choice["delta"].get("content") or ""
                if piece and not text:
                    first = time.perf_counter() - started
                text += piece
            tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
    except (OSError, http.client.HTTPException):
        failed = True
    finally:
        connection.close()
    with lock:
        if failed:
            load.failed += 1
            return
        load.first_s.append(first)
        load.whole_s.append(time.perf_counter() - started)
        load.tokens += tokens
        load.wrong += text.strip() != asked.text.strip()


def resident(pid: int) -> int:
    """Bytes in memory of a process."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(shown.stdout or 0) * 1024


def run(
    pid: int, port: int, model: str, asked: list[Asked], clients: int, seconds: float
) -> dict[str, Any]:
    load, lock, over = Load(), threading.Lock(), threading.Event()

    def client(number: int) -> None:
        place = number
        while not over.is_set():
            ask(port, model, asked[place % len(asked)], load, lock)
            place += clients + 1

    ask(port, model, asked[0], Load(), lock)
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    while time.perf_counter() - started < seconds:
        time.sleep(1)
        load.memory.append(resident(pid))
    over.set()
    for thread in threads:
        thread.join()
    return load.report(time.perf_counter() - started)


def shown(name: str, report: dict[str, Any]) -> str:
    return (
        f"{name}: {report['answers']:,} answers, {report['wrong']} of them others than alone, "
        f"{report['failed']} failed; first token {report['ttft_p50_s']:.2f} s (p50), "
        f"{report['ttft_p95_s']:.2f} s (p95); {report['tokens_per_s']:.0f} tokens/s, "
        f"{report['answers_per_s']:.2f} answers/s; memory "
        f"{report['memory_after_a_quarter'] / 1e6:.0f} MB after a quarter, "
        f"{report['memory_at_the_end'] / 1e6:.0f} MB at the end"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle = arguments.bundle.resolve()
    here = machine()
    print(
        f"{here['platform']}, {here['cores']} cores, load {os.getloadavg()[0]:.1f}; "
        f"{arguments.clients} clients for {arguments.seconds:g} s"
    )
    asked = questions(bundle)
    found = {}
    servers = {"fastvlm serve": ours(bundle)}
    if arguments.peer:
        servers["mlx-vlm"] = theirs(arguments.peer, bundle)
    for name, server in servers.items():
        with server as (pid, port):
            found[name] = run(pid, port, str(bundle), asked, arguments.clients, arguments.seconds)
        print(shown(name, found[name]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": here, "servers": found}, indent=2))


if __name__ == "__main__":
    main()
