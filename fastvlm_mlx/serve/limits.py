"""What a server takes, and from whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from fastvlm_mlx.bundle.schema import check_fields
from fastvlm_mlx.errors import OptionError

MAX_STOPS = 4
MAX_CHOICES = 8
# Requests of the largest size that are held in memory, or so many bytes of smaller ones.
HELD_BODIES = 16


@dataclass(frozen=True)
class Settings:
    """How a server is run.

    Attributes:
        host, port: where it listens; port 0 is any that is free.
        api_key: what a client must show, or None.
        allow_url: hosts that images are fetched from, each with a port where it is not the usual.
        allow_origin: origins whose pages may use the server, as "https://example.org".
        batch_size: answers that are decoded together.
        queue: answers that may wait for a place beside them.
        connections: open at once.
        max_body: bytes of a request.
        max_image_bytes: of an image that is fetched.
        max_images: in a request.
        max_tokens: of an answer.
        client_timeout: seconds that a client may take to send a request, or to read an answer on.
        fetch_timeout: seconds that fetching an image may take.
        shutdown_timeout: seconds that answers have to come to their end in.

    Raises:
        OptionError: a value of another type or outside its range, or an address that others can
            reach without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allow_url: Sequence[str] = ()
    allow_origin: Sequence[str] = ()
    batch_size: int = 16
    queue: int = 64
    connections: int = 512
    max_body: int = 32_000_000
    max_image_bytes: int = 16_000_000
    max_images: int = 16
    max_tokens: int = 2048
    client_timeout: float = 30.0
    fetch_timeout: float = 10.0
    shutdown_timeout: float = 30.0

    def __post_init__(self) -> None:
        check_fields(self, OptionError)
        for name in ("batch_size", "connections", "max_body", "max_image_bytes", "max_tokens"):
            self._at_least(name, 1)
        for name in ("queue", "max_images", "shutdown_timeout"):
            self._at_least(name, 0)
        for name in ("client_timeout", "fetch_timeout"):
            self._at_least(name, 0.1)
        if not 0 <= self.port < 2**16:
            raise OptionError(f"--port is {self.port}: expected a number from 0 to 65535")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise OptionError("--api-key holds other characters: expected printable ASCII")
        if self.api_key == "":
            raise OptionError("--api-key is empty: expected a secret, or leave it out")
        if self.api_key is None and not self.loopback:
            raise OptionError(
                f"--host is {self.host!r}, which other machines can reach: expected a key too, set "
                "FASTVLM_API_KEY or give --api-key"
            )

    def _at_least(self, name: str, low: float) -> None:
        value = getattr(self, name)
        if value < low:
            option = name.replace("_", "-")
            raise OptionError(f"--{option} is {value}: expected {low} or more")

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False
