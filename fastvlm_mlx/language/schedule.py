"""Questions that come at any time: each joins the answers that are being decoded, and leaves them.

`batch` is for questions that one caller has; here each has a caller of its own, who is told of its
answer piece by piece and may give it up. Nobody drives it: while there is something to compute,
each step leaves the next one behind on the thread that computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.language.batch import Asked
from fastvlm_mlx.language.decode import Batch
from fastvlm_mlx.language.generate import Answer, GenerationResult
from fastvlm_mlx.language.kept import Kept
from fastvlm_mlx.language.logprobs import says
from fastvlm_mlx.language.wired_memory import wired
from fastvlm_mlx.language.worker import Worker

if TYPE_CHECKING:
    from fastvlm_mlx.language.model import RunningModel

# A piece of text, and last the result or what went wrong.
Told = str | GenerationResult | BaseException
# Images that are decoded at once, each of which may be as large as the limit allows; and questions
# that are made ready before there is room for them, with 12 MB for each image of 1024×1024.
_PREPARERS, _READY = 2, 4


class Ticket:
    """A question in a schedule."""

    def __init__(self, asked: Asked, tell: Callable[[Told], None]):
        self.prepare: Callable[[], Any] | None = asked.prepare
        self.begin = asked.begin
        self.prepared: Any = None
        self.over = False
        self._tell = tell

    def cancel(self) -> None:
        """Give the answer up, from any thread: its place is free at the next token."""
        self.over = True
        # It holds the images.
        self.prepare = None

    def tell(self, told: Told) -> None:
        if not self.over:
            self.over = not isinstance(told, str)
            if not isinstance(told, str) or says(told):
                self._tell(told)


class Schedule:
    """Decodes the answers of all who ask at the same time, each as it would be alone.

    An error that concerns one question is told to who asked it, and to nobody else.
    """

    def __init__(self, worker: Worker, model: RunningModel, kept: Callable[[], Kept], size: int):
        """
        Args:
            kept: called on the thread that computes.
            size: how many are decoded together; others wait for their turn.
        """
        self._worker, self._model, self._kept, self._size = worker, model, kept, size
        self._pool = ThreadPoolExecutor(_PREPARERS, "fastvlm-prepare")
        self._lock = Lock()
        self._running = self._closed = False
        self._preparing = 0
        self._waiting: deque[Ticket] = deque()
        self._ready: deque[Ticket] = deque()
        self._active: list[tuple[Ticket, Answer]] = []
        self._steps: Generator[None] | None = None

    def add(self, asked: Asked, tell: Callable[[Told], None]) -> Ticket:
        """Have a question answered.

        Args:
            tell: called on some thread with each piece of the answer, and last with its result or
                with an exception. It must return at once, and not raise.

        Raises:
            FastVLMError: the schedule was closed.
        """
        ticket = Ticket(asked, tell)
        with self._lock:
            if self._closed:
                raise FastVLMError("no more questions are answered here: load the model again")
            self._waiting.append(ticket)
            self._have_prepared()
        return ticket

    def close(self) -> None:
        """Answer no more questions; who still waits for an answer is told so."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False)
        self._wake()

    def _have_prepared(self) -> None:
        """Have the next ones made ready. With the lock held."""
        while self._waiting and self._preparing + len(self._ready) < _READY and not self._closed:
            self._preparing += 1
            self._pool.submit(self._prepare, self._waiting.popleft())

    def _prepare(self, ticket: Ticket) -> None:
        prepare, ticket.prepare = ticket.prepare, None
        is_ready = False
        try:
            if prepare is not None and not ticket.over:
                # Those who come too late are told so in their turn.
                ticket.prepared = None if self._closed else prepare()
                is_ready = True
        # Whatever it is, it concerns who asked.
        except Exception as error:  # noqa: BLE001
            ticket.tell(error)
        with self._lock:
            self._preparing -= 1
            if is_ready:
                self._ready.append(ticket)
            self._have_prepared()
        if is_ready:
            self._wake()

    def _next(self) -> Ticket:
        """One that is ready, in whose place another is made ready."""
        with self._lock:
            ticket = self._ready.popleft()
            self._have_prepared()
        return ticket

    def _wake(self) -> None:
        with self._lock:
            if self._running:
                return
            self._running = True
        self._go_on()

    def _go_on(self) -> None:
        try:
            self._worker.submit(self._turn)
        except FastVLMError as error:
            # Python is about to end.
            self._give_up(error)

    def _turn(self) -> None:
        """One step, on the thread that computes. Tasks of others come between it and the next."""
        if self._steps is None:
            # From here on until there is nothing left to do.
            self._steps = wired(self._decode())
            self._worker.opened(self._steps)
        if next(self._steps, self) is self:
            self._steps = None
        with self._lock:
            self._running = self._steps is not None or bool(self._ready)
            if not self._running:
                return
        self._go_on()

    def _decode(self) -> Generator[None]:
        """With each step begin one answer, decode one token of all that have begun, or both."""
        batch = Batch(self._model.language_model, ahead=self._model.lazy)
        while self._ready or self._active or self._closed:
            if self._closed:
                self._give_up(FastVLMError("the program is being ended: ask again later"))
                return
            self._leave(batch)
            try:
                # One at a time, or those who come would keep those who are here from going on.
                if self._ready and len(self._active) < self._size:
                    self._begin(batch, self._next())
                if self._active:
                    self._advance(batch)
            # Of memory, say. It concerns all that were computed together, and nobody later.
            except Exception as error:  # noqa: BLE001
                for ticket, _ in self._active:
                    ticket.tell(error)
                self._active = []
                batch = Batch(self._model.language_model, ahead=self._model.lazy)
            self._leave(batch)
            yield

    def _begin(self, batch: Batch, ticket: Ticket) -> None:
        if ticket.over:
            return
        try:
            answer = ticket.begin(ticket.prepared)
            answer.continued.begin(self._model.language_model, self._kept())
        # Whatever it is, it concerns who asked.
        except Exception as error:  # noqa: BLE001
            ticket.tell(error)
            return
        ticket.prepared = None
        self._active.append((ticket, answer))
        batch.join(answer.continued)

    def _advance(self, batch: Batch) -> None:
        for token, (ticket, answer) in zip(batch.advance(), self._active, strict=True):
            try:
                ticket.tell(answer.add(token))
                if answer.ended:
                    ticket.tell(answer.flush())
                    ticket.tell(answer.result())
            except FastVLMError as error:
                ticket.tell(error)

    def _leave(self, batch: Batch) -> None:
        """Let go of answers that have ended, and of those that nobody waits for."""
        batch.leave([place for place, (ticket, _) in enumerate(self._active) if ticket.over])
        self._active = [each for each in self._active if not each[0].over]

    def _give_up(self, error: FastVLMError) -> None:
        with self._lock:
            left = [*self._ready, *self._waiting]
            self._ready.clear()
            self._waiting.clear()
        for ticket in left:
            ticket.tell(error)
        for ticket, _ in self._active:
            ticket.tell(error)
        self._active = []
