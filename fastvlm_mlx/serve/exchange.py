"""A request on its way: its places, and its answers as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Receive

from fastvlm_mlx.language.batch import Asked
from fastvlm_mlx.language.generate import GenerationResult
from fastvlm_mlx.language.schedule import Schedule, Ticket, Told
from fastvlm_mlx.serve.errors import ApiError

T = TypeVar("T")
# What answers are assumed to take before one has come, in seconds.
_FIRST_GUESS = 2.0


class ClientGoneError(Exception):
    """The client does not wait any more."""


class Places:
    """Answers that are computed or wait for it: so many, and no more.

    Attributes:
        taken: by answers.
        held: bytes of the requests that are in memory.
    """

    def __init__(self, size: int, queue: int, most_held: int):
        self.size, self.queue, self.taken = size, queue, 0
        self.held, self._most_held = 0, most_held
        self._seconds = _FIRST_GUESS

    def hold(self, count: int) -> None:
        """Raises ApiError: there is no room for so many bytes more."""
        if self.held + count > self._most_held:
            raise ApiError(
                f"the server holds {self.held:,} bytes of requests and has room for "
                f"{self._most_held:,}: try again in a second",
                429,
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.held += count

    def let_go(self, count: int) -> None:
        self.held -= count

    def take(self, count: int) -> None:
        """Raises ApiError: there is no room."""
        if self.taken + count > self.size + self.queue:
            wait = max(1, round(self._seconds * (1 + self.queue / self.size)))
            raise ApiError(
                f"the server is busy with {self.taken} answers and has room for "
                f"{self.size + self.queue}: try again in {wait} seconds",
                429,
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )
        self.taken += count

    def give_back(self, count: int, seconds: float) -> None:
        self.taken -= count
        self._seconds += (seconds - self._seconds) / 8


class Held:
    """The bytes of one request in memory."""

    def __init__(self, places: Places):
        self._places, self._count = places, 0

    def add(self, count: int) -> None:
        """Raises ApiError: there is no room."""
        self._places.hold(count)
        self._count += count

    def let_go(self) -> None:
        self._places.let_go(self._count)
        self._count = 0


class Answers:
    """The answers to one request: iterate over pieces and results, each with its index.

    Its places are taken when it is made. Each is given back when its answer has come, whether or
    not the client has read that, and the others when it is closed.
    """

    def __init__(self, places: Places, count: int):
        """Raises ApiError: there is no room."""
        places.take(count)
        self._places, self._left, self._held = places, count, count
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        # It holds no more than the answers, however long nobody reads it.
        self._told: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        self._tickets: list[Ticket] = []

    def start(self, schedule: Schedule, asked: list[Asked]) -> None:
        """One question for each place."""
        for index, each in enumerate(asked):
            self._tickets.append(schedule.add(each, self._teller(index)))

    def _teller(self, index: int) -> Callable[[Told], None]:
        def tell(told: Told) -> None:
            # The loop may have been closed meanwhile.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._come, index, told)

        return tell

    def _come(self, index: int, told: Told) -> None:
        self._told.put_nowait((index, told))
        if not isinstance(told, str) and self._held:
            self._give_back(1)

    def _give_back(self, count: int) -> None:
        self._held -= count
        self._places.give_back(count, self._loop.time() - self._started)

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> tuple[int, str | GenerationResult]:
        """Raises whatever went wrong with one of the answers."""
        if not self._left:
            raise StopAsyncIteration
        index, told = await self._told.get()
        if isinstance(told, BaseException):
            raise told
        if not isinstance(told, str):
            self._left -= 1
        return index, told

    def close(self) -> None:
        """Give up what has not come."""
        for ticket in self._tickets:
            ticket.cancel()
        if self._held:
            self._give_back(self._held)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises. Raises ClientGoneError: the client went away meanwhile."""
    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError
        return doing.result()
    finally:
        for task in (doing, watching):
            task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
