"""Who may use the server, and what it fetches for them."""

import asyncio
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from PIL import Image
from serving import NAME, client_of, message, serving

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.serve.errors import ApiError
from fastvlm_mlx.serve.fetch import Fetcher, Place, is_public
from fastvlm_mlx.serve.limits import Settings
from fastvlm_mlx.serve.server import listen

USER = [{"role": "user", "content": "What is it?"}]
MADE = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(MADE, "PNG")
PNG = MADE.getvalue()


@pytest.fixture(scope="module")
def locked(model):
    with serving(model, api_key="secret", allow_origin=["https://pages.example"]) as running:
        yield running


@pytest.mark.parametrize("key", ["none", "secret2", "secre"])
def test_a_wrong_key_is_refused(locked, key):
    with pytest.raises(openai.AuthenticationError) as error:
        client_of(locked, key).models.list()
    assert error.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "line", [b"", b"Authorization: secret\r\n", b"Authorization: Bearer s\xe9cret\r\n"]
)
def test_what_is_no_key_is_refused(locked, line):
    asked = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + line + b"\r\n"
    assert locked.send(asked).startswith(b"HTTP/1.1 401")


def test_the_key_opens_and_health_needs_none(locked):
    client = client_of(locked, "secret")
    found = client.chat.completions.create(model=NAME, messages=USER, max_tokens=1)
    assert found.usage.completion_tokens == 1
    answer = locked.send(b"GET /health HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("origin", "allowed"), [("https://pages.example", True), ("https://others.example", False)]
)
def test_pages_of_an_allowed_origin_may_ask(locked, origin, allowed):
    asked = (
        "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n"
        "Access-Control-Request-Headers: authorization, content-type, x-stainless-os\r\n\r\n"
    )
    answer = locked.send(asked.encode())
    assert answer.startswith(b"HTTP/1.1 200") == allowed
    assert (f"access-control-allow-origin: {origin}".encode() in answer) == allowed


@pytest.mark.parametrize(
    "given",
    [
        {"host": "0.0.0.0"},
        {"host": "example.org"},
        {"port": 70_000},
        {"batch_size": 0},
        {"queue": -1},
        {"max_tokens": 0},
        {"client_timeout": 0.0},
        {"client_timeout": float("nan")},
        {"api_key": ""},
        {"api_key": "schlüssel"},
        {"max_body": "much"},
    ],
)
def test_settings_that_are_none(given):
    with pytest.raises(OptionError, match="expected"):
        Settings(**given)


def test_an_address_that_is_taken():
    taken = listen(Settings(port=0))
    with taken, pytest.raises(OptionError, match="choose another port"):
        listen(Settings(port=taken.getsockname()[1]))


@pytest.mark.parametrize("text", ["", "http://a.example", "a.example:x", "*", "a b"])
def test_a_place_that_is_none(text):
    with pytest.raises(OptionError, match="--allow-url"):
        Place.of(text)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fec0::1", False),
        ("192.0.0.192", False),
        ("192.88.99.1", False),
        ("ff02::1", False),
        ("localhost", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public


class Site(BaseHTTPRequestHandler):
    """Images, redirects, and what is neither."""

    def do_GET(self):
        self.server.asked.append(self.headers["Host"])
        where, _, argument = self.path[1:].partition("/")
        if where == "to":
            self.send_response(302)
            self.send_header("Location", argument)
            self.end_headers()
            return
        self.send_response(404 if where == "none" else 200)
        self.end_headers()
        if where == "image":
            self.wfile.write(PNG)
        elif where == "large":
            self.wfile.write(PNG + bytes(50_000))
        elif where == "slow":
            self.wfile.flush()
            self.server.over.wait(10)
        else:
            self.wfile.write(b"<html>")

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked, server.over = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()


def fetcher(site, addresses=("127.0.0.1",), looked_up=None, **more):
    """One that looks names up in a list, and may go to this machine's own address."""
    answers = iter(addresses)

    async def resolve(host, port):
        if looked_up is not None:
            looked_up.append(host)
        return [next(answers)]

    port = site.server_address[1]
    places = frozenset({Place("images.example", port), Place("mirror.example", port)})
    own = {"public": lambda address: address == "127.0.0.1" or is_public(address)}
    return Fetcher(places, 20_000, 1.0, resolve, **own | more)


def test_an_image_comes_from_the_address_that_was_looked_up_once(site):
    port, looked_up = site.server_address[1], []
    # A second look-up would lead elsewhere.
    found = asyncio.run(
        fetcher(site, ["127.0.0.1", "10.0.0.1"], looked_up).get(
            f"http://images.example:{port}/image"
        )
    )
    assert found == PNG
    assert (looked_up, site.asked) == (["images.example"], [f"images.example:{port}"])


def test_a_redirect_is_checked_like_the_first_address(site):
    port = site.server_address[1]
    start = f"http://images.example:{port}/to/"
    moved = f"http://mirror.example:{port}/image"
    assert asyncio.run(fetcher(site, ["127.0.0.1"] * 2).get(start + moved)) == PNG
    assert asyncio.run(fetcher(site, ["127.0.0.1"] * 2).get(start + "/image")) == PNG
    own = f"http://127.0.0.1:{port}/image"
    for to in (own, "file:///etc/passwd", "http://[::1/", "//x.example/"):
        with pytest.raises(ApiError):
            asyncio.run(fetcher(site, ["127.0.0.1"] * 2).get(start + to))
    with pytest.raises(ApiError, match="network beside it"):
        asyncio.run(fetcher(site, ["127.0.0.1", "10.0.0.1"]).get(start + moved))
    with pytest.raises(ApiError, match="more than 3 times"):
        asyncio.run(fetcher(site, ["127.0.0.1"] * 9).get(start + "/to/" * 5 + "/image"))


@pytest.mark.parametrize(
    ("path", "said"),
    [("large", "more than 20,000 bytes"), ("none", "answers 404"), ("slow", "did not answer")],
)
def test_what_is_no_image_of_a_size_and_in_time(site, path, said):
    with pytest.raises(ApiError, match=said):
        asyncio.run(fetcher(site).get(f"http://images.example:{site.server_address[1]}/{path}"))


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/image",
        "http://images.example/image",
        "http://images.example@other.example/image",
        "http://user:word@images.example:{port}/image",
        "http://images.example:{port}@127.0.0.1/image",
        "http://127.0.0.1:{port}/image",
        "ftp://images.example:{port}/image",
        "http://images.example:{port}/a\r\nHost: x",
        "http://images.example:{port}/ä",
    ],
)
def test_other_addresses_are_not_fetched(site, url):
    with pytest.raises(ApiError):
        asyncio.run(fetcher(site).get(url.format(port=site.server_address[1])))
    assert site.asked == []


def test_private_addresses_are_not_connected_to(site):
    with pytest.raises(ApiError, match="network beside it") as error:
        asyncio.run(
            fetcher(site, public=is_public).get(f"http://images.example:{site.server_address[1]}/")
        )
    assert (error.value.status, site.asked) == (403, [])


def test_a_request_with_addresses(model, site):
    with serving(model, fetcher(site, ["127.0.0.1"] * 9)) as running:
        client = client_of(running)
        base = f"http://images.example:{site.server_address[1]}"

        def ask(url):
            messages = [message("What is it?", url)]
            return client.chat.completions.create(model=NAME, messages=messages, max_tokens=2)

        expected = model.generate(PNG, "What is it?", max_tokens=2)
        assert ask(f"{base}/image").choices[0].message.content == expected.text
        with pytest.raises(openai.BadRequestError, match="none of PNG"):
            ask(f"{base}/page")
        with pytest.raises(openai.PermissionDeniedError, match="--allow-url"):
            ask("https://other.example/")
        running.free()
