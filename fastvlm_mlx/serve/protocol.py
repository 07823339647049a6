"""uvicorn's HTTP/1.1 with limits on clients that are slow on purpose.

uvicorn waits for ever for the end of a request's head and for a client to read its answer.
"""

from __future__ import annotations

import asyncio

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastvlm_mlx.serve.errors import ApiError


def protocol(patience: float, connections: int) -> type[H11Protocol]:
    """
    Args:
        patience: seconds for a request's head to come, and for the client to read on.
        connections: that may be open at once; another one is closed.
    """

    class Patient(H11Protocol):
        """A connection that is closed when its client keeps it waiting."""

        _reading: asyncio.TimerHandle | None = None
        _writing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # Every byte that is not sent is waited for, and the last ones before a close too.
            transport.set_write_buffer_limits(0)
            if len(self.connections) > connections:
                transport.abort()
                return
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop("_reading")
            self._stop("_writing")
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE:
                # What came is no whole head, or belongs to a body that was answered already.
                self._await_head()
            else:
                self._stop("_reading")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stop("_writing")
            self._writing = self.loop.call_later(patience, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop("_writing")
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP gets an answer in the same form as all else."""
            error = ApiError("the request is no HTTP/1.1: send it with a client that speaks it")
            body = msgspec.json.encode(error.body())
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
                for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _await_head(self) -> None:
            if self._reading is None:
                self._reading = self.loop.call_later(patience, self.transport.abort)

        def _stop(self, name: str) -> None:
            timer: asyncio.TimerHandle | None = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)

    return Patient
