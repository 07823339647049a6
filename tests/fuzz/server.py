"""One server for all cases of a worker: whatever it is sent, it answers, and the next one right."""

from __future__ import annotations

import http.client
import io
import json
import logging
import os
import socket
import threading
import time
from typing import Any

from tests.fuzz import judge, wire
from tests.fuzz.case import Case
from tests.fuzz.stock import Stock
from tests.fuzz.worker import resident

# Of the server: seconds that it waits for a client.
PATIENCE = 2.0
# Seconds within which anything is answered or closed, and a plain request is answered.
_ANSWERED, _PLAIN = 15.0, 30.0
# Bytes that the server may hold more than after its first cases, and how many those are.
_GROWTH, _FIRST = 400_000_000, 40
_MOST = 2_000_000
PLAIN = {
    "model": wire.NAME,
    "messages": [{"role": "user", "content": "How many shapes are there?"}],
    "max_tokens": 6,
}


class _Log(logging.Handler):
    """What the server says went wrong."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(logging.Formatter().format(record))


class _Served:
    """The server of this process, its log, and what it answers when nothing is wrong."""

    def __init__(self, stock: Stock):
        import fastvlm_mlx
        from fastvlm_mlx.serve.limits import Settings
        from fastvlm_mlx.serve.server import listen, server, service

        model = fastvlm_mlx.load(stock / "mlx", max_pixels=4_000_000)
        self.expected = model.generate(None, "How many shapes are there?", max_tokens=6).text
        settings = Settings(port=0, max_tokens=8, client_timeout=PATIENCE, max_body=_MOST)
        self.service = service(model, wire.NAME, settings)
        listening = listen(settings)
        self.address = listening.getsockname()[:2]
        self._running = server(self.service)
        self.log = _Log()
        logging.getLogger().addHandler(self.log)
        threading.excepthook = lambda arguments: self.log.found.append(repr(arguments.exc_value))
        threading.Thread(target=self._running.run, args=([listening],), daemon=True).start()
        end = time.monotonic() + 60
        while not self._running.started:
            if time.monotonic() > end:
                raise RuntimeError("the server does not start")
            time.sleep(0.01)
        self.cases, self.held = 0, 0

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=_ANSWERED)


_served: list[_Served] = []


def warm(stock: Stock) -> None:
    if not _served:
        _served.append(_Served(stock))


def prepare(case: Case) -> None:
    case.source.mkdir()
    make = case.rng.choice(wire.MAKERS)
    for number, data in enumerate(make(case.rng, case.stock)):
        (case.source / f"{number:02}.bin").write_bytes(data)
    # The log of requests is on standard error.
    case.facts = {"mutator": make.__name__.strip("_"), "prints": True}


def run(case: Case) -> None:
    warm(case.stock)
    (served,) = _served
    served.log.found.clear()
    how = case.facts["mutator"]
    for file in sorted(case.source.iterdir()):
        data = file.read_bytes()
        if how == "gone":
            with served.connect() as to:
                _send(case, to, data)
        else:
            _exchange(case, served, data, must_refuse=how == "both_lengths")
    _plain(case, served)
    for text in served.log.found:
        last = text.strip().splitlines()[-1][:200]
        case.bad(f"the server's log: {last}", text[-3000:])
    _room(case, served)


def _send(case: Case, to: socket.socket, data: bytes) -> None:
    """In pieces, as a network brings them."""
    try:
        at = 0
        while at < len(data):
            size = case.rng.choice((1, 100, len(data)))
            to.sendall(data[at : at + size])
            at += size
    # What was answered before its end is closed while it comes.
    except ConnectionError:
        pass


def _exchange(case: Case, served: _Served, data: bytes, *, must_refuse: bool) -> None:
    started = time.monotonic()
    with served.connect() as to:
        _send(case, to, data)
        received, closed = _received(to, started + _ANSWERED)
    answers, rest = _answers(received)
    case.outcomes += [str(status) for status, _ in answers] or ["closed" if closed else "silence"]
    if not answers and not closed:
        case.bad("hung connection", f"nothing in {_ANSWERED} s; {received[:300]!r}")
    if rest:
        case.bad("no HTTP in the answer", repr(rest[:500]))
    if must_refuse and [status for status, _ in answers] != [400]:
        case.bad("two lengths taken", f"{answers}"[:500])
    for status, content in answers:
        if status >= 500:
            case.bad(f"status {status}", repr(content[:500]))
        elif status >= 400:
            _sentence(case, status, content)


def _sentence(case: Case, status: int, content: bytes) -> None:
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        case.bad(f"status {status} without an error in OpenAI's form", repr(content[:500]))
        return
    if judge.unprintable(message) or len(message) > judge.LONGEST:
        case.bad("unprintable or long error", repr(message[:1000]))


def _received(to: socket.socket, end: float) -> tuple[bytes, bool]:
    """What comes until the connection is closed, or until there is an answer and no more comes."""
    data = bytearray()
    to.settimeout(0.1)
    quiet = 0
    while time.monotonic() < end:
        try:
            part = to.recv(1 << 16)
        except TimeoutError:
            quiet += 1
            found, rest = _answers(bytes(data))
            if found and not rest and quiet > 1:
                return bytes(data), False
            continue
        except ConnectionError:
            return bytes(data), True
        if not part:
            return bytes(data), True
        data += part
        quiet = 0
    return bytes(data), False


class _Bytes:
    """As `http.client` takes a socket."""

    def __init__(self, data: bytes):
        self.stream = io.BytesIO(data)

    def makefile(self, *_: Any) -> io.BytesIO:
        return self.stream


class _Unclosed(io.BytesIO):
    """Many answers are read from it."""

    def close(self) -> None:
        pass


def _answers(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The status and content of each whole answer, and what follows the last of them."""
    source = _Bytes(b"")
    source.stream = _Unclosed(data)
    found, end = [], 0
    while end < len(data):
        answer = http.client.HTTPResponse(source)  # type: ignore[arg-type]
        try:
            answer.begin()
            content = answer.read()
        except (http.client.HTTPException, OSError, ValueError):
            break
        found.append((answer.status, content))
        end = source.stream.tell()
    return found, data[end:]


def _plain(case: Case, served: _Served) -> None:
    """The next request of an ordinary client."""
    connection = http.client.HTTPConnection(*served.address, timeout=_PLAIN)
    started = time.monotonic()
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", wire.CHAT, json.dumps(PLAIN), headers)
        answer = connection.getresponse()
        status, content = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        case.bad("the next request has no answer", f"{error!r} after {_since(started)}")
        return
    finally:
        connection.close()
    if status != 200:
        case.bad(f"the next request gets {status}", repr(content[:500]))
        return
    text = json.loads(content)["choices"][0]["message"]["content"]
    if text != served.expected:
        case.bad("the next answer is wrong", f"{text!r}, expected {served.expected!r}")


def _since(started: float) -> str:
    return f"{time.monotonic() - started:.1f} s"


def _room(case: Case, served: _Served) -> None:
    """Places, threads and memory that an answer took are given back."""
    end = time.monotonic() + _ANSWERED
    places = served.service.places
    while (places.taken or places.held) and time.monotonic() < end:
        time.sleep(0.01)
    if places.taken or places.held:
        case.bad("places are not given back", f"{places.taken} answers, {places.held} bytes")
    served.cases += 1
    held = resident(os.getpid())
    if served.cases <= _FIRST:
        served.held = max(served.held, held)
    elif held - served.held > _GROWTH and case.kind == "server":
        case.bad("memory grows", f"{held / 1e6:.0f} MB after {served.cases} cases")
        served.held = held
