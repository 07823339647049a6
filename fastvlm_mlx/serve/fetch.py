"""Images from addresses: only from hosts that were allowed, and never from this machine's network.

A host is looked up once, and the connection goes to the very address that was checked: another
look-up could be answered in another way. A redirect is an address like the first one.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from socket import SOCK_STREAM
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from fastvlm_mlx.errors import OptionError, printable
from fastvlm_mlx.serve.errors import ApiError

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 3
_MAX_URL = 2_000
_CHUNK = 1 << 16
# Through these an address of IPv4 is reached, whichever it is.
_CARRIERS = [
    IPv6Network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
]
# Of a network alone, though not every Python says so.
_LOCAL: list[IPv4Network | IPv6Network] = [
    IPv4Network("192.0.0.0/24"),
    IPv4Network("192.88.99.0/24"),
    IPv6Network("fec0::/10"),
]

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Whether an address is one of the internet, and not of this machine or a network beside it."""
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if found.scope_id or any(found in net for net in _CARRIERS):
            return False
    if any(found in net for net in _LOCAL if net.version == found.version):
        return False
    return found.is_global and not found.is_multicast and not found.is_reserved


@dataclass(frozen=True)
class Place:
    """A host that images may come from; port None is the usual one of http and https."""

    host: str
    port: int | None = None

    @classmethod
    def of(cls, text: str) -> Place:
        """Raises OptionError: not HOST or HOST:PORT."""
        host, colon, port = text.strip().lower().partition(":")
        if not _HOST.fullmatch(host) or (colon and not (port.isdecimal() and int(port) < 2**16)):
            raise OptionError(
                f"--allow-url is {text!r}: expected a host such as images.example.org, with "
                ":PORT behind it where that is not 80 or 443"
            )
        return cls(host, int(port) if colon else None)


@dataclass(frozen=True)
class Fetcher:
    """Fetches images from the places that were allowed.

    Attributes:
        max_bytes: of a file.
        timeout: seconds for all that it takes, redirects included.
        resolve, public: how hosts are looked up, and which addresses are connected to.
    """

    places: frozenset[Place]
    max_bytes: int
    timeout: float
    resolve: Resolve = resolve
    public: Callable[[str], bool] = field(default=is_public)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def get(self, url: str) -> bytes:
        """The file at an address. Raises ApiError: it is not allowed, or can't be fetched."""
        try:
            async with asyncio.timeout(self.timeout):
                for _ in range(_MAX_REDIRECTS + 1):
                    found = await self._one(url)
                    if isinstance(found, bytes):
                        return found
                    url = urljoin(url, found)
        except TimeoutError as error:
            raise _refused(
                f"the image's address did not answer in {self.timeout:g} seconds: send the image "
                "as a data URL"
            ) from error
        # ssl's errors and the resolver's are OSErrors; a redirect to no URL is a ValueError.
        except (OSError, h11.ProtocolError, ValueError) as error:
            raise _refused(
                f"the image can't be fetched ({type(error).__name__}): send it as a data URL"
            ) from error
        raise _refused(f"the image's address redirects more than {_MAX_REDIRECTS} times")

    async def _one(self, url: str) -> bytes | str:
        """The file, or the address that this one redirects to."""
        parts, port = self._checked(url)
        host = str(parts.hostname)
        address = await self._address(host, port)
        secure = parts.scheme == "https"
        reader, writer = await asyncio.open_connection(
            address,
            port,
            ssl=self._tls if secure else None,
            server_hostname=host if secure else None,
        )
        try:
            return await self._exchange(parts, reader, writer)
        finally:
            # Whatever it still has to say.
            writer.transport.abort()

    def _checked(self, url: str) -> tuple[SplitResult, int]:
        if len(url) > _MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
            raise _refused("the image's address is no plain URL: expected printable ASCII")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise _refused(f"the image's address is no URL ({error}): check it") from error
        if parts.scheme not in _PORTS:
            raise _refused(
                "the image's address is neither a data URL nor one of http or https: expected "
                "data:image/png;base64, and the file in base64"
            )
        host = (parts.hostname or "").rstrip(".")
        usual = port is None or port == _PORTS[parts.scheme]
        allowed = Place(host, port) in self.places or (usual and Place(host) in self.places)
        if not allowed or "@" in parts.netloc:
            shown = printable(host, 100)
            raise ApiError(
                f"images are not fetched from {shown!r}: send the image as a data URL, or start "
                "the server with --allow-url and the host",
                403,
                param="messages",
                code="url_not_allowed",
            )
        return parts, _PORTS[parts.scheme] if port is None else port

    async def _address(self, host: str, port: int) -> str:
        addresses = await self.resolve(host, port)
        # One that is not public makes the others doubtful too.
        if not addresses or not all(map(self.public, addresses)):
            raise ApiError(
                f"{host} is an address of this machine or of a network beside it: images are "
                "fetched from public addresses alone",
                403,
                param="messages",
                code="url_not_allowed",
            )
        return addresses[0]

    async def _exchange(
        self, parts: SplitResult, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | str:
        connection = h11.Connection(h11.CLIENT)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host = parts.netloc
        headers = [
            ("Host", host),
            ("User-Agent", "fastvlm"),
            ("Accept", "image/*"),
            ("Connection", "close"),
        ]
        request = h11.Request(method="GET", target=target, headers=headers)
        writer.write(connection.send(request) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        data = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                location = _header(event, b"location")
                if event.status_code in _REDIRECTS and location is not None:
                    return location
                if event.status_code != 200:
                    raise _refused(f"the image's address answers {event.status_code}: check it")
            elif isinstance(event, h11.Data):
                data += event.data
                if len(data) > self.max_bytes:
                    raise _refused(
                        f"the file at the image's address has more than {self.max_bytes:,} bytes: "
                        "expected a smaller one"
                    )
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return bytes(data)


def _header(response: h11.Response, name: bytes) -> str | None:
    for key, value in response.headers:
        if key == name:
            return value.decode("ascii", "replace")
    return None


def _refused(message: str) -> ApiError:
    return ApiError(message, param="messages", code="invalid_image")
