"""Who may use the server, looked at before a request is read; and the log's line at its end."""

from __future__ import annotations

import asyncio
import hmac
import sys
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvlm_mlx.errors import printable
from fastvlm_mlx.serve.api import Record, error_response
from fastvlm_mlx.serve.errors import ApiError, answer_to
from fastvlm_mlx.serve.exchange import ClientGoneError
from fastvlm_mlx.serve.limits import Settings
from fastvlm_mlx.serve.metrics import Metrics

# What shows nothing of anybody's: the page asks for the key, and balancers have none.
_OPEN = {"/", "/health"}
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}
# As nginx writes it; nobody receives it.
_GONE = 499
_ENDED = ApiError(
    "the server is being ended: ask again later",
    503,
    kind="server_error",
    code="server_ended",
    headers={"Connection": "close"},
)


class Guard:
    """Lets requests through to `app`, and turns what goes wrong with them into answers."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope["fastvlm"] = Record()
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, sent)
        except (ClientDisconnect, ClientGoneError):
            record.gone = True
        except asyncio.CancelledError:
            # The server is being ended, and has waited for this answer as long as it should.
            record.gone = False
            if not status:
                await error_response(_ENDED)(scope, receive, sent)
        # Whatever it is, it is this request's, and the next one is answered.
        except Exception as error:  # noqa: BLE001
            answer = answer_to(error)
            if not status:
                await error_response(answer)(scope, receive, sent)
        finally:
            self._write(scope, _GONE if record.gone else status, record)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError: the request comes from where none should come from, has no key, or ends
        in two places."""
        headers, settings = Headers(scope=scope), self._settings
        # A proxy may believe the one and take for the next request what the other calls the body.
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError(
                "the request has both Content-Length and Transfer-Encoding: send one of them",
                headers={"Connection": "close"},
            )
        host = headers.get("host", "").lower()
        names = {*_LOOPBACK_NAMES, settings.host}
        # A page of somebody else's may have had its name pointed here.
        if settings.loopback and settings.api_key is None and _name(host) not in names:
            raise ApiError(
                f"the request is for the host {host[:100]!r}: expected localhost, which is all "
                "that this server answers to without a key",
                403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        own = {f"http://{host}", f"https://{host}"}
        if origin is not None and origin not in own and origin not in settings.allow_origin:
            raise ApiError(
                f"pages of {origin[:100]!r} may not use this server: start it with --allow-origin "
                "and their origin",
                403,
                code="origin_not_allowed",
            )
        is_open = scope["path"] in _OPEN or _preflight(scope, headers)
        if settings.api_key is not None and not is_open:
            self._check_key(headers, settings.api_key)

    def _check_key(self, headers: Mapping[str, str], key: str) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode(), key.encode()
        ):
            raise ApiError(
                "the request has no key of this server, or a wrong one: send Authorization: "
                "Bearer and the key",
                401,
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _write(self, scope: Scope, status: int, record: Record) -> None:
        took = time.perf_counter() - record.started
        self._metrics.count(scope["path"], status, took, record)
        client = (scope.get("client") or ("-",))[0]
        parts = [
            time.strftime("%H:%M:%S"),
            str(client),
            printable(scope["method"], 20),
            printable(scope["path"], 100),
            str(status),
            f"{took:.3f} s",
        ]
        if record.first_s is not None:
            parts.append(f"first token {record.first_s:.3f} s")
        if record.results:
            prompt = record.results[0]
            made = sum(result.generation_tokens for result in record.results)
            parts.append(
                f"{prompt.prompt_tokens} + {made} tokens, {prompt.cached_tokens} of them kept"
            )
        if record.gone:
            parts.append("the client went away")
        print(" · ".join(parts), file=sys.stderr, flush=True)


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _preflight(scope: Scope, headers: Mapping[str, str]) -> bool:
    """Whether a browser asks if it may ask, which it does without a key."""
    return scope["method"] == "OPTIONS" and "access-control-request-method" in headers
