"""uvicorn with the patience of a server that strangers may talk to."""

from __future__ import annotations

import socket

import uvicorn

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.serve.api import Service
from fastvlm_mlx.serve.app import application
from fastvlm_mlx.serve.app import service as service
from fastvlm_mlx.serve.limits import Settings
from fastvlm_mlx.serve.protocol import protocol

_BACKLOG = 512


def listen(settings: Settings) -> socket.socket:
    """Raises OptionError: the address can't be listened on."""
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            # Whoever comes before the model is loaded waits for it.
            made.listen(_BACKLOG)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise OptionError(
            f"--host {settings.host} --port {settings.port} can't be listened on "
            f"({error.strerror}): choose another port"
        ) from error
    return made


def url(listening: socket.socket) -> str:
    """The address of a server that listens there."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(service: Service) -> uvicorn.Server:
    """A server that is not running yet: `run` it with a listening socket."""
    settings = service.settings
    return uvicorn.Server(
        uvicorn.Config(
            application(service),
            http=protocol(settings.client_timeout, settings.connections),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(settings.client_timeout)),
            timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
        )
    )
