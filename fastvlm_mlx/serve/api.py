"""From a request of either kind to its answer, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.language.batch import Asked
from fastvlm_mlx.language.generate import GenerationResult
from fastvlm_mlx.language.schedule import Schedule
from fastvlm_mlx.serve.errors import ApiError, answer_to
from fastvlm_mlx.serve.exchange import Answers, Held, Places, unless_gone
from fastvlm_mlx.serve.fetch import Fetcher
from fastvlm_mlx.serve.formats.requests import Wanted
from fastvlm_mlx.serve.images import fetched
from fastvlm_mlx.serve.limits import Settings

# Requests that are taken apart at once: one may have a JSON schema, which takes seconds to try.
_READERS = 4


class Shape(Protocol):
    """What the answers to a request look like."""

    def whole(self, results: list[GenerationResult]) -> dict[str, Any]: ...

    def begin(self) -> Iterable[bytes]: ...

    def piece(self, index: int, text: str) -> Iterable[bytes]: ...

    def ended(self, index: int, result: GenerationResult) -> Iterable[bytes]: ...

    def end(self, results: list[GenerationResult]) -> Iterable[bytes]: ...

    def failed(self, error: ApiError) -> Iterable[bytes]: ...


@dataclass
class Record:
    """What the log and the metrics say of a request, as far as it went.

    Attributes:
        first_s: seconds until the first piece of an answer.
    """

    started: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    results: list[GenerationResult] = field(default_factory=list)
    gone: bool = False

    def note(self, told: str | GenerationResult) -> None:
        if self.first_s is None:
            self.first_s = time.perf_counter() - self.started
        if not isinstance(told, str):
            self.results.append(told)


@dataclass(frozen=True)
class Service:
    """What requests are answered with.

    Attributes:
        name: what clients call the model.
        started: seconds since 1970.
    """

    model: FastVLM
    name: str
    settings: Settings
    schedule: Schedule
    places: Places
    fetcher: Fetcher
    readers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_READERS))
    started: int = field(default_factory=lambda: int(time.time()))

    async def answer(
        self,
        request: Request,
        read: Callable[[bytes, Settings], Wanted],
        shaped: Callable[[Wanted], Shape],
    ) -> Response:
        """Raises ApiError: there is none, and why."""
        record: Record = request.scope["fastvlm"]
        held = Held(self.places)
        try:
            wanted = await self._read(request, read, held)
            answers = Answers(self.places, wanted.n)
            with ExitStack() as undo:
                undo.callback(answers.close)
                first = await unless_gone(request.receive, self._begin(answers, wanted))
                # What follows may take long, and needs no images.
                wanted.turns.clear()
                held.let_go()
                if wanted.stream:
                    undo.pop_all()
                    return _Events(answers, first, shaped(wanted), wanted.n, record)
                collecting = _all(answers, first, wanted.n, record)
                results = await unless_gone(request.receive, collecting)
                undo.pop_all()
        finally:
            held.let_go()
        return json_response(shaped(wanted).whole(results))

    async def _read(
        self, request: Request, read: Callable[[bytes, Settings], Wanted], held: Held
    ) -> Wanted:
        body = await read_body(request, self.settings, held)
        async with self.readers:
            wanted = await asyncio.to_thread(read, body, self.settings)
        if wanted.model != self.name:
            raise ApiError(
                f"the model {wanted.model[:100]!r} is not served here: expected {self.name!r}",
                404,
                param="model",
                code="model_not_found",
            )
        return wanted

    async def _begin(self, answers: Answers, wanted: Wanted) -> tuple[int, str | GenerationResult]:
        """The first piece: until it has come, an error is an answer with a status of its own."""
        messages = await fetched(wanted, self.fetcher)
        answers.start(self.schedule, [self._asked(messages, wanted, i) for i in range(wanted.n)])
        return await anext(answers)

    def _asked(self, messages: list[dict[str, Any]], wanted: Wanted, index: int) -> Asked:
        options = wanted.options
        if options.seed is not None:
            options = replace(options, seed=(options.seed + index) % 2**64)
        return self.model.asked(messages, options)


async def _all(
    answers: Answers, first: tuple[int, str | GenerationResult], count: int, record: Record
) -> list[GenerationResult]:
    results: dict[int, GenerationResult] = {}
    index, told = first
    while True:
        record.note(told)
        if not isinstance(told, str):
            results[index] = told
        if len(results) == count:
            return [results[place] for place in range(count)]
        index, told = await anext(answers)


class _Events(StreamingResponse):
    """Server-sent events. However it ends, what is still computed of the answers is given up."""

    def __init__(
        self,
        answers: Answers,
        first: tuple[int, str | GenerationResult],
        shape: Shape,
        count: int,
        record: Record,
    ):
        self._answers, self._shape, self._record = answers, shape, record
        self._over = False
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(
            self._events(first, count), headers=headers, media_type="text/event-stream"
        )

    async def _events(
        self, first: tuple[int, str | GenerationResult], count: int
    ) -> AsyncIterator[bytes]:
        shape, results = self._shape, {}
        index, told = first
        yield b"".join(shape.begin())
        while True:
            self._record.note(told)
            if isinstance(told, str):
                yield b"".join(shape.piece(index, told))
            else:
                results[index] = told
                yield b"".join(shape.ended(index, told))
            if len(results) == count:
                break
            try:
                index, told = await anext(self._answers)
            # Whatever it is: the stream has begun, and says so in an event of its own.
            except Exception as error:  # noqa: BLE001
                self._over = True
                yield b"".join(shape.failed(answer_to(error)))
                return
        self._over = True
        yield b"".join(shape.end([results[place] for place in range(count)]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._record.gone = not self._over
            self._answers.close()


async def read_body(request: Request, settings: Settings, held: Held) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is no JSON by its type, too large, takes too long to come, or there is no room
            for it.
        ClientDisconnect: it does not come any more.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            f"the request's Content-Type is {kind[:100]!r}: expected application/json", 415
        )
    too_large = ApiError(
        f"the request has more than {settings.max_body:,} bytes: send smaller images, or start the "
        "server with a larger --max-body",
        413,
        code="request_too_large",
    )
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > settings.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.client_timeout):
            async for part in request.stream():
                body += part
                if len(body) > settings.max_body:
                    raise too_large
                held.add(len(part))
    except TimeoutError as error:
        raise ApiError(
            f"the request did not come in {settings.client_timeout:g} seconds: send it again",
            408,
            headers={"Connection": "close"},
        ) from error
    return bytes(body)


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(data), status, headers=headers, media_type="application/json"
    )


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)
