"""Whatever is sent: a 4xx with one sentence, or the connection closed; and the next is answered."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import NAME, data_url, message, read, serving

from fastvlm_mlx.serve.errors import ApiError
from fastvlm_mlx.serve.formats.responses import read_responses
from fastvlm_mlx.serve.limits import Settings
from fastvlm_mlx.serve.server import listen

SMALL = data_url(Image.new("RGB", (8, 8), "red"))
USER = [{"role": "user", "content": "What is it?"}]


def post(running, body, path="/v1/chat/completions", **headers):
    """Status, headers and JSON of what is answered to a body."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    told = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return parsed(running.send(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body))


def parsed(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    data = json.loads(body) if headers.get("content-type") == "application/json" else body
    return SimpleNamespace(status=int(first.split()[1]), headers=headers, body=data)


def check_refused(answer, status=400):
    assert answer.status == status
    error = answer.body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert 20 < len(error["message"]) <= 1000


def check_well(running):
    """The next request is answered."""
    answer = post(running, {"model": NAME, "messages": USER, "max_tokens": 1})
    assert (answer.status, answer.body["usage"]["completion_tokens"]) == (200, 1)


def image(url):
    return {"messages": [message("What is it?", url)]}


def png(width, height):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def encoded(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def gif():
    made = io.BytesIO()
    Image.new("P", (4, 4)).save(made, "GIF")
    return made.getvalue()


def with_more(keys):
    """A request that is answered but for the JSON of some more keys."""
    return b'{"model": "demo", "max_tokens": 1, "messages": [%b], %b}' % (
        json.dumps(USER[0]).encode(),
        keys,
    )


BAD = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "no UTF-8": b'{"model": "\xff"}',
    "deep": b"[" * 100_000,
    "deep in a key": b'{"model": "demo", "messages": ' + b'[{"a":' * 50_000 + b"1",
    "closed and deep": b'{"metadata": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "many lists": with_more(b'"x": [' + b"[]," * 100_000 + b"1]"),
    "many objects": with_more(b'"x": [' + b"{}," * 100_000 + b"1]"),
    "many keys": with_more(b'"x": 1,' * 200_000 + b'"x": 1'),
    "too large a number": b'{"model": "demo", "max_tokens": 1' + b"0" * 400 + b"}",
    "no messages": {"messages": None},
    "empty messages": {"messages": []},
    "message of a number": {"messages": [7]},
    "unknown role": {"messages": [{"role": "king", "content": "x"}]},
    "a tool's": {"messages": [{"role": "tool", "content": "x"}]},
    "no content": {"messages": [{"role": "user", "content": None}]},
    "blank": {"messages": [{"role": "user", "content": " "}]},
    "assistant last": {"messages": [*USER, {"role": "assistant", "content": "x"}]},
    "unknown part": {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
    "half a character": b'{"model":"demo","messages":[{"role":"user","content":"\\ud800"}]}',
    "too long": {"messages": [{"role": "user", "content": "word " * 200_000}]},
    "too many images": {"messages": [message("x", *[SMALL] * 17)]},
    "no image": image("data:image/png;base64,aGVsbG8="),
    "no base64": image("data:image/png;base64,***"),
    "no data URL": image("data:image/png,abc"),
    "another type": image(encoded(gif())),
    "a page": image(encoded(b"<html>", "text/html")),
    "a type too long": image("data:" + "a" * 300_000 + ";base64,"),
    "cut": image(SMALL[:-40]),
    "bomb": image(png(60_000, 60_000)),
    "wide bomb": image(png(2**31 - 1, 1)),
    "a file": image("file:///etc/passwd"),
    "a path": image("/etc/passwd"),
    "a long address": image("https://example.org/" + "a" * 5_000),
    "an odd address": image("http://[::1"),
    "detail": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": SMALL, "detail": "best"}}]}]},
    "negative": {"max_tokens": -1},
    "zero": {"max_completion_tokens": 0},
    "too many tokens": {"max_tokens": 10**6},
    "text for a number": {"max_tokens": "5"},
    "truth for a number": {"max_tokens": True},
    "hot": {"temperature": 2.1},
    "cold": {"temperature": -1},
    "more than all": {"top_p": 1.5},
    "negative seed": {"seed": -1},
    "huge seed": {"seed": 2**70},
    "n": {"n": 9},
    "no n": {"n": 0},
    "stops": {"stop": ["a"] * 10_000},
    "an empty stop": {"stop": [""]},
    "a long stop": {"stop": "a" * 200_000},
    "tools": {"tools": [{"type": "function"}]},
    "logit_bias": {"logit_bias": {"1": 100}},
    "penalty": {"frequency_penalty": 1.0},
    "sound": {"modalities": ["audio"]},
    "stream": {"stream": "yes"},
    "an unknown form": {"response_format": {"type": "xml"}},
    "a form without a schema": {"response_format": {"type": "json_schema"}},
    "a schema that is none": {"response_format": {
        "type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}},
    "a schema without end": {"response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"enum": ["a" * 1000] * 1500}}}},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_in_a_sentence(running, name):
    body = BAD[name]
    if isinstance(body, dict):
        body = {"model": NAME, "messages": USER, **body}
    check_refused(post(running, body), 403 if name == "an address" else 400)


def test_the_next_request_is_answered(running):
    check_well(running)
    running.free()


@pytest.mark.parametrize(
    ("body", "status", "headers"),
    [
        ({"model": "another", "messages": USER}, 404, {}),
        ({"model": NAME, "messages": USER}, 415, {"Content_Type": "text/plain"}),
        (b"a" * 2_000_001, 413, {}),
        ({"model": NAME, "messages": USER}, 413, {"Content_Length": "999999999999"}),
        ({"model": NAME, "messages": USER}, 403, {"Host": "attacker.example"}),
        ({"model": NAME, "messages": USER}, 403, {"Host": "127.0.0.1.attacker.example:80"}),
        ({"model": NAME, "messages": USER}, 403, {"Origin": "https://attacker.example"}),
        ({"model": NAME, "messages": USER}, 403, {"Origin": "null"}),
    ],
)  # fmt: skip
def test_statuses(running, body, status, headers):
    check_refused(post(running, body, **headers), status)


def test_paths_and_methods(running):
    check_refused(post(running, {}, "/v1/embeddings"), 404)
    check_refused(post(running, {}, "/v1/models"), 405)
    check_refused(post(running, {}, "/v1/responses"))
    check_refused(post(running, {"model": NAME, "input": 3}, "/v1/responses"))
    body = {"model": NAME, "input": "x", "previous_response_id": "resp_1"}
    check_refused(post(running, body, "/v1/responses"))
    check_refused(parsed(running.send(b"this is no HTTP\r\n\r\n")))
    assert parsed(running.send(b"GET /" + b"a" * 100_000)).status == 400


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: local",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"a\"",
    ],
    ids=["nothing", "head", "body", "chunks"],
)  # fmt: skip
def test_who_is_slow_on_purpose_is_cut_off(running, sent):
    started = time.monotonic()
    with running.connect() as to:
        to.sendall(sent)
        answer = read(to)
    assert time.monotonic() - started < 15
    if sent.endswith(b"\r\n\r\n{") or b"chunked" in sent:
        check_refused(parsed(answer), 408)
    check_well(running)


def test_a_head_that_comes_a_byte_at_a_time_has_an_end(running):
    with running.connect() as to:
        started = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - started < 15:
                to.sendall(b"a")
                time.sleep(0.1)
    assert time.monotonic() - started < 10


def test_a_body_that_nobody_waits_for_has_an_end(running):
    head = b"Host: attacker.example\r\nContent-Length: 1000000"
    with running.connect() as to:
        started = time.monotonic()
        to.sendall(b"POST /v1/responses HTTP/1.1\r\n" + head + b"\r\n\r\n")
        with suppress(OSError):
            while time.monotonic() - started < 15:
                to.sendall(b"a")
                time.sleep(0.1)
    assert time.monotonic() - started < 10


def test_all_requests_together_have_a_limit(running):
    places = running.service.places
    most = 16 * 2_000_000
    places.hold(most - places.held - 10)
    try:
        check_refused(post(running, {"model": NAME, "messages": USER}), 429)
    finally:
        places.let_go(most - 10)
    check_well(running)
    assert places.held == 0


def test_who_does_not_read_holds_up_nobody(running):
    body = json.dumps(
        {"model": NAME, "messages": USER, "stream": True, "n": 8, "temperature": 2}
    ).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with running.connect() as to:
        to.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
        check_well(running)
        running.free()


def test_who_does_not_read_the_last_bytes_is_cut_off(model, monkeypatch):
    def small(settings):
        listening = listen(settings)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listening

    # Less than what asyncio takes for much, and more than the sockets hold.
    monkeypatch.setattr("serving.listen", small)
    asked = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    with serving(model, client_timeout=0.5, connections=1) as running, socket.socket() as to:
        to.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        to.connect(running.address)
        to.sendall((asked + b"\r\n") * 4 + asked + b"Connection: close\r\n\r\n")
        time.sleep(1.5)
        check_well(running)


def test_connections_have_a_limit(model):
    with serving(model, connections=3) as running:
        held = [running.connect() for _ in range(3)]
        time.sleep(0.2)
        assert running.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
        for each in held:
            each.close()
        time.sleep(0.2)
        check_well(running)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "input_text", "input_image", "x"]) | JSON},
    optional={
        "text": st.just("What is it?") | JSON,
        "image_url": st.sampled_from([SMALL, {"url": SMALL}, {"url": "data:,"}]) | JSON,
    },
)
TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "assistant", "developer"]) | JSON,
        "content": st.just("What is it?") | st.lists(PART, max_size=3) | JSON,
    }
)
TURNS = st.lists(TURN, min_size=1, max_size=3) | st.just(USER) | JSON
NUMBER = st.integers(-2, 9) | st.floats(allow_nan=False) | JSON
REQUEST = st.fixed_dictionaries(
    {"model": st.just(NAME) | JSON, "messages": TURNS, "input": TURNS, "max_tokens": st.just(1)},
    optional={
        "max_completion_tokens": NUMBER,
        "max_output_tokens": NUMBER,
        "temperature": NUMBER,
        "top_p": NUMBER,
        "seed": NUMBER,
        "n": NUMBER,
        "stop": st.text() | st.lists(st.text(), max_size=5) | JSON,
        "stream": st.booleans() | JSON,
        "stream_options": JSON,
        "response_format": st.just({"type": "text"}) | JSON,
        "text": JSON,
        "instructions": JSON,
        "metadata": JSON,
        "tools": JSON,
        "logprobs": st.booleans() | JSON,
        "top_logprobs": NUMBER,
        "include": st.just(["message.output_text.logprobs"]) | JSON,
    },
)


@given(body=REQUEST, path=st.sampled_from(["/v1/chat/completions", "/v1/responses"]))
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_request_is_a_fault_of_the_server(running, body, path):
    body = {**body, "max_output_tokens": body.get("max_output_tokens", 1)}
    answer = post(running, json.dumps(body, ensure_ascii=False).encode(errors="replace"), path)
    if answer.status != 200:
        assert 400 <= answer.status < 500
        check_refused(answer, answer.status)


@pytest.mark.parametrize("first", ["Content-Length", "Transfer-Encoding"])
@pytest.mark.parametrize("length", [0, 4, 1000])
def test_a_request_that_ends_in_two_places_is_refused_and_what_follows_it_not_read(
    running, first, length
):
    body = json.dumps({"model": NAME, "messages": USER, "max_tokens": 1}).encode()
    lines = {"Content-Length": str(length), "Transfer-Encoding": "chunked"}
    order = sorted(lines, reverse=first == "Transfer-Encoding")
    head = "".join(f"{name}: {lines[name]}\r\n" for name in order)
    sent = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}"
    sent += "Content-Type: application/json\r\n\r\n"
    hidden = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = running.send(sent.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) + hidden)
    assert answer.count(b"HTTP/1.1 ") == 1
    check_refused(parsed(answer))
    assert parsed(answer).headers["connection"] == "close"
    check_well(running)


def test_threads_are_not_left_behind(running):
    running.free()
    before = threading.active_count()
    for _ in range(5):
        check_well(running)
    assert threading.active_count() <= before + 2


def test_what_comes_back_is_limited():
    asked = {"model": "demo", "input": "x", "metadata": {str(number): "" for number in range(17)}}
    with pytest.raises(ApiError, match="metadata"):
        read_responses(json.dumps(asked).encode(), Settings())
