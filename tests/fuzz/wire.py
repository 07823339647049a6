"""What is sent to a server: requests that are valid but for one thing, and bytes that are none."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from typing import Any

from tests.fuzz.mutate import damaged, edited_json, fragment, text
from tests.fuzz.stock import Stock

NAME = "demo"
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
PATHS = (CHAT, RESPONSES, "/v1/models", f"/v1/models/{NAME}", "/health", "/metrics", "/")
# Keys that requests have, where edits put what nobody expects.
KEYS = (
    *("model", "messages", "input", "max_tokens", "max_completion_tokens", "max_output_tokens"),
    *("temperature", "top_p", "stop", "seed", "n", "stream", "stream_options", "response_format"),
    *("logprobs", "top_logprobs", "include", "text", "instructions", "metadata", "tools"),
)
NUMBERS = (
    *("0", "-1", "1", "2", "1.5", "-0.0", "1e308", "1e999", "-1e999", "NaN", "Infinity", "1e-320"),
    *("9" * 400, "1" + "0" * 5000, str(2**31), str(2**63), str(2**64), "0.1", "21", "8"),
)
SCHEMAS: tuple[Any, ...] = (
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"$ref": "http://127.0.0.1:1/x.json"},
    {"$ref": "file:///etc/passwd"},
    {"type": "string", "pattern": "(a+)+$" * 50},
    {"type": "string", "pattern": "(?=x)"},
    {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
    {"enum": [str(number) * 20 for number in range(5000)]},
    {"enum": []},
    {"not": {}},
    {"type": "nothing"},
    {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    {"type": "integer", "minimum": 10**30, "maximum": 0},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"properties": {str(number): {"type": "string"} for number in range(3000)}},
    {"type": "object", "additionalProperties": {"$ref": "#"}},
)


def body(rng: random.Random, path: str, stock: Stock, *, image: bool = False) -> dict[str, Any]:
    """A request that nothing is wrong with."""
    made: dict[str, Any] = {"model": NAME, "stream": rng.random() < 0.3}
    if rng.random() < 0.3:
        made |= {"temperature": 1.0, "top_p": 0.9}
    words = rng.choice(("What is it?", "Well?", "é€𝒳 日本"))
    url = _data_url((stock / "images" / "small.png").read_bytes())
    if path == CHAT:
        parts: Any = words
        if image:
            shown = {"type": "image_url", "image_url": {"url": url}}
            parts = [shown, {"type": "text", "text": words}]
        made |= {"messages": [{"role": "user", "content": parts}], "max_tokens": 3}
        if rng.random() < 0.3:
            made |= {"logprobs": True, "top_logprobs": rng.choice((0, 5, 20))}
        if rng.random() < 0.2:
            made |= {"n": 2, "seed": 4, "stop": ["x", " a"]}
    else:
        parts = words
        if image:
            shown = {"type": "input_image", "image_url": url}
            parts = [shown, {"type": "input_text", "text": words}]
        made |= {"input": [{"role": "user", "content": parts}], "max_output_tokens": 3}
    return made


def request(
    content: bytes, path: str = CHAT, method: str = "POST", headers: tuple[str, ...] | None = None
) -> bytes:
    if headers is None:
        headers = ("Content-Type: application/json", f"Content-Length: {len(content)}")
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogatepass") + content


def _data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _encoded(made: Any) -> bytes:
    return json.dumps(made).encode()


def _edited(rng: random.Random, stock: Stock) -> list[bytes]:
    path = rng.choice((CHAT, RESPONSES))
    made = json.dumps(body(rng, path, stock, image=rng.random() < 0.3))
    content = edited_json(rng, made, KEYS)[0]
    return [request(content.encode("utf-8", "surrogatepass"), path)]


def _trees(rng: random.Random, stock: Stock) -> list[bytes]:
    """Messages in messages, parts that are none, nesting, many of everything."""
    path = rng.choice((CHAT, RESPONSES))
    made = body(rng, path, stock)
    key = "messages" if path == CHAT else "input"
    turn = {"role": rng.choice(("user", "assistant", "system", "developer")), "content": "a"}
    how = rng.randrange(7)
    if how == 0:
        made[key] = [turn] * rng.choice((1, 2, 500, 10_001))
    elif how == 1:
        deep = rng.choice((60, 1000, 100_000))
        content = json.dumps(made)[:-1] + f', "{key}": ' + "[" * deep + "]" * deep + "}"
        return [request(content.encode(), path)]
    elif how == 2:
        made[key] = [{"role": "user", "content": [{"type": "text", "text": text(rng)}] * 300}]
    elif how == 3:
        made[key] = [{"role": text(rng), "content": text(rng), "name": text(rng)}, turn]
    elif how == 4:
        made[key] = [turn, {"role": "user", "content": [[{"type": "text", "text": "a"}]]}]
    elif how == 5:
        made[key] = [{"role": "user", "content": "x" * rng.choice((10, 20_000, 1_900_000))}]
    else:
        made |= {"stop": rng.choice((["a"] * 5, [""], "x" * 100_001, [text(rng)]))}
    content = json.dumps(made, ensure_ascii=rng.random() < 0.5)
    return [request(content.encode("utf-8", "surrogatepass"), path)]


def _numbers(rng: random.Random, stock: Stock) -> list[bytes]:
    path = rng.choice((CHAT, RESPONSES))
    content = json.dumps(body(rng, path, stock))
    keys = ("max_tokens", "temperature", "top_p", "seed", "n", "top_logprobs", "max_output_tokens")
    for key in rng.sample(keys, rng.randint(1, 3)):
        content = content[:-1] + f', "{key}": {rng.choice((*NUMBERS, fragment(rng)))}' + "}"
    return [request(content.encode("utf-8", "surrogatepass"), path)]


def _images(rng: random.Random, stock: Stock) -> list[bytes]:
    """Image parts that lie: about their type, their content, their place."""
    data = (stock / "images" / "small.png").read_bytes()
    kinds = ("image/png", "image/jpeg", "image/svg+xml", "text/html", "image/gif", "", "é")
    urls = (
        _data_url(damaged(rng, data)[0]),
        _data_url(data, rng.choice(kinds)),
        _data_url(b"", rng.choice(kinds)),
        _data_url(b"\x89PNG\r\n\x1a\n" + rng.randbytes(200)),
        _bomb(),
        "data:image/png;base64,@@@@" + text(rng),
        "data:image/png," + text(rng),
        "data:" + "," * 1000,
        rng.choice(("http", "https", "ftp", "file")) + "://127.0.0.1:1/" + text(rng),
        "http://[::1]:99999/",
        "http://user:pass@localhost/",
        "file:///etc/passwd",
        text(rng),
    )
    path = rng.choice((CHAT, RESPONSES))
    made = body(rng, path, stock, image=True)
    (turn,) = made["messages"] if path == CHAT else made["input"]
    detail = rng.choice(("auto", "low", "high", "original", "x"))
    shown = turn["content"][0]
    if path == CHAT:
        shown["image_url"] |= {"url": rng.choice(urls), "detail": detail}
    else:
        shown |= {"image_url": rng.choice(urls), "detail": detail}
    turn["content"] *= rng.choice((1, 1, 1, 20))
    return [request(_encoded(made), path)]


def _bomb() -> str:
    """An image of a billion pixels in a few bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    made = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return _data_url(b"\x89PNG\r\n\x1a\n" + made)


def _schemas(rng: random.Random, stock: Stock) -> list[bytes]:
    schema: Any = rng.choice(SCHEMAS)
    if rng.random() < 0.4:
        ordinary = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
        changed = edited_json(rng, json.dumps(ordinary), ("type", "$ref", "enum", "anyOf"))[0]
        try:
            schema = json.loads(changed)
        except (ValueError, RecursionError):
            schema = text(rng)
    path = rng.choice((CHAT, RESPONSES))
    made = body(rng, path, stock)
    if path == CHAT:
        kind = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        made["response_format"] = kind
    else:
        made["text"] = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    return [request(json.dumps(made).encode("utf-8", "surrogatepass"), path)]


def _headers(rng: random.Random, stock: Stock) -> list[bytes]:
    content = _encoded(body(rng, CHAT, stock))
    size = len(content)
    given = ["Content-Type: application/json", f"Content-Length: {size}"]
    odd = rng.choice(
        (
            f"Content-Length: {size + rng.choice((1, 50, -1, -size))}",
            "Content-Length: -5",
            "Content-Length: 1e3",
            f"Content-Length: {'9' * 300}",
            "Content-Length: \u0665",
            "Content-Type: text/plain",
            "Content-Type: application/json; charset=utf-16",
            "Content-Encoding: gzip",
            f"Host: {text(rng)}",
            "Host: evil.example",
            "Origin: http://evil.example",
            f"Origin: {text(rng)}",
            "Expect: 100-continue",
            "Expect: " + "x" * 100,
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAA",
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c",
            "X: " + "a" * rng.choice((10, 7_000, 70_000)),
            " folded: yes",
            "no colon",
            "Na\0me: x",
            f"Authorization: Bearer {text(rng)}",
            "Transfer-Encoding: gzip",
            "Transfer-Encoding: chunked, chunked",
            "\r\n".join(f"X-{number}: 1" for number in range(rng.choice((100, 3000)))),
        )
    )
    given.insert(rng.randrange(3), odd)
    return [request(content, headers=tuple(given))]


def chunked(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)


def both_lengths(rng: random.Random, stock: Stock) -> list[bytes]:
    """A request whose end two readers find in two places."""
    content = _encoded(body(rng, CHAT, stock))
    framed = chunked(content)
    length = rng.choice((0, 4, len(content), len(framed), len(framed) + 40))
    given = [f"Content-Length: {length}", "Transfer-Encoding: chunked"]
    rng.shuffle(given)
    hidden = request(b"", "/v1/models", "GET", ())
    given = ["Content-Type: application/json", *given]
    return [request(framed, headers=tuple(given)) + rng.choice((b"", hidden))]


def _chunks(rng: random.Random, stock: Stock) -> list[bytes]:
    content = _encoded(body(rng, CHAT, stock))
    framed = rng.choice(
        (
            chunked(content),
            b"%x;%s\r\n%s\r\n0\r\n\r\n" % (len(content), b"e" * 5000, content),
            b"%x\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (len(content), content),
            b"-5\r\n" + content,
            b"zz\r\n" + content,
            b"f" * 30 + b"\r\n" + content,
            b"%x\r\n%s" % (len(content) + 10, content),
            b"%x\r\n%sXX0\r\n\r\n" % (len(content), content),
            b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n",
            damaged(rng, chunked(content))[0],
            b"",
        )
    )
    given = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    return [request(framed, headers=given)]


def _raw(rng: random.Random, stock: Stock) -> list[bytes]:
    whole = request(_encoded(body(rng, rng.choice((CHAT, RESPONSES)), stock)))
    return [
        rng.choice(
            (
                damaged(rng, whole)[0],
                whole[: rng.randrange(len(whole))],
                rng.randbytes(rng.choice((1, 100, 100_000))),
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
                b"GET / HTTP/1.0\r\n\r\n",
                b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
                b"\r\n" * rng.choice((1, 1000)) + whole,
                b"",
            )
        )
    ]


def _pipelined(rng: random.Random, stock: Stock) -> list[bytes]:
    parts = [
        request(_encoded(body(rng, CHAT, stock))),
        request(b"", "/health", "GET", ()),
        request(b"{", CHAT),
        request(b"", "/nowhere", "GET", ()),
    ]
    made = [rng.choice(parts) for _ in range(rng.randint(2, 20))]
    if rng.random() < 0.6:
        made.insert(rng.randrange(len(made)), rng.randbytes(rng.choice((1, 30, 3000))))
    return [b"".join(made)]


def _routes(rng: random.Random, stock: Stock) -> list[bytes]:
    methods = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "X" * 300)
    odd = (
        *("/v1/models/%00", "/v1/models/" + "a" * 3000, "/../../etc/passwd", "//", "*", "/%ff%fe"),
        *("http://evil.example/v1/models", "/v1/models/%2e%2e", "/?" + "a=b&" * 500, "/v1/é"),
    )
    path = rng.choice((*PATHS, *PATHS, *odd))
    content = rng.choice((b"", b"{}", _encoded(body(rng, CHAT, stock)), b"\0" * 1000, b"[]"))
    return [request(content, path, rng.choice(methods))]


def _gone(rng: random.Random, stock: Stock) -> list[bytes]:
    """Clients that do not wait: `server` closes these as soon as they are sent."""
    made = []
    for _ in range(rng.randint(1, 6)):
        asked = body(rng, CHAT, stock, image=rng.random() < 0.3)
        whole = request(_encoded({**asked, "max_tokens": 8, "stream": True}))
        made.append(whole if rng.random() < 0.7 else whole[: rng.randrange(1, len(whole))])
    return made


MAKERS: tuple[Callable[[random.Random, Stock], list[bytes]], ...] = (
    *(_edited, _edited, _edited, _trees, _numbers, _images, _images, _schemas, _headers, _headers),
    *(both_lengths, _chunks, _raw, _pipelined, _routes, _gone),
)
