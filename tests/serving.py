"""A server in a thread of the test's process, and what tests say to it."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import openai
from PIL import Image

from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.serve.api import Service
from fastvlm_mlx.serve.fetch import Fetcher
from fastvlm_mlx.serve.limits import Settings
from fastvlm_mlx.serve.server import listen, server, service, url

NAME = "demo"


@dataclass
class Running:
    """A server that listens."""

    url: str
    service: Service

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=20)

    def send(self, data: bytes) -> bytes:
        """What is answered to bytes, until the connection is closed or nothing more comes."""
        with self.connect() as to:
            to.sendall(data)
            return read(to)

    def free(self) -> None:
        """Wait until no answer is computed."""
        until(lambda: self.service.places.taken == 0)


def read(from_: socket.socket) -> bytes:
    data = bytearray()
    try:
        while part := from_.recv(1 << 16):
            data += part
    except (TimeoutError, ConnectionError):
        pass
    return bytes(data)


def until(true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@contextmanager
def serving(model: FastVLM, fetcher: Fetcher | None = None, **settings: Any) -> Iterator[Running]:
    """
    Args:
        fetcher: in place of the one that the settings say.
    """
    settings = {"port": 0, "max_tokens": 64, "shutdown_timeout": 1.0, **settings}
    chosen = Settings(**settings)
    served = service(model, NAME, chosen)
    if fetcher is not None:
        served = replace(served, fetcher=fetcher)
    listening = listen(chosen)
    running = server(served)
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    until(lambda: running.started)
    try:
        yield Running(url(listening), served)
    finally:
        running.should_exit = True
        thread.join(20)
        served.schedule.close()


def client_of(running: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def busy(model: FastVLM) -> Iterator[None]:
    """Nothing is computed meanwhile."""
    over = threading.Event()
    waiting = model.worker.submit(over.wait, 60)
    try:
        yield
    finally:
        over.set()
        waiting.result()


def data_url(image: Image.Image, kind: str = "png") -> str:
    made = io.BytesIO()
    image.save(made, kind)
    return f"data:image/{kind};base64,{base64.b64encode(made.getvalue()).decode()}"


def message(text: str, *images: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
