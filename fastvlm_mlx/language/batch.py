"""Many questions at once: each is begun by itself, and all that have begun are continued together.

A decoded token reads all weights, and so do the next tokens of sixteen answers. While they are
decoded, the images that come next are made ready on another thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat, zip_longest
from numbers import Integral
from os import PathLike
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import finalize

from fastvlm_mlx.errors import FastVLMError, ImageError, OptionError, PromptError
from fastvlm_mlx.language.decode import Batch
from fastvlm_mlx.language.generate import Answer, GenerationResult
from fastvlm_mlx.language.kept import Kept
from fastvlm_mlx.language.wired_memory import wired
from fastvlm_mlx.language.worker import Worker

if TYPE_CHECKING:
    from fastvlm_mlx.language.model import RunningModel

T = TypeVar("T")
DEFAULT_BATCH_SIZE = 16
# Images that are made ready before there is room for them: 12 MB each at 1024×1024.
_READY = 2


_ABSENT: Any = object()


def check_batch_size(size: Any) -> int:
    """Raises OptionError: no number of answers."""
    if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
        raise OptionError(f"the batch size is {size!r}: expected a whole number, 1 or more")
    return int(size)


def pairs(images: Iterable[T], prompts: str | Iterable[str]) -> Iterator[tuple[T, str]]:
    """Each image with its prompt.

    Raises:
        ImageError, PromptError: one in place of several; while iterating, more of one than of the
            other.
    """
    if isinstance(images, str | bytes | PathLike) or not isinstance(images, Iterable):
        raise ImageError(
            f"the images are of type {type(images).__name__}: expected a list or another iterable "
            "of images"
        )
    if isinstance(prompts, str):
        return zip(images, repeat(prompts))
    if not isinstance(prompts, Iterable):
        raise PromptError(
            f"the prompts are of type {type(prompts).__name__}: expected a text for all images, or "
            "one for each"
        )
    return _pairs(images, prompts)


def _pairs(images: Iterable[T], prompts: Iterable[str]) -> Iterator[tuple[T, str]]:
    for index, (image, prompt) in enumerate(zip_longest(images, prompts, fillvalue=_ABSENT)):
        if image is _ABSENT or prompt is _ABSENT:
            more, fewer = ("prompts", "images") if image is _ABSENT else ("images", "prompts")
            raise PromptError(
                f"there are {index} {fewer} and more {more}: expected as many of one as of the "
                "other"
            )
        yield image, prompt


@dataclass(frozen=True)
class Asked:
    """A question that has not begun.

    Attributes:
        prepare: what can be done on any thread.
        begin: the answer, from what `prepare` returns; called on the thread that computes.
    """

    prepare: Callable[[], Any]
    begin: Callable[[Any], Answer]


@dataclass
class _Table:
    """What the thread that asks and the thread that computes hand each other."""

    ready: deque[tuple[int, Any, Callable[[Any], Answer]]] = field(default_factory=deque)
    active: int = 0
    done: dict[int, GenerationResult | BaseException] = field(default_factory=dict)


class Answers:
    """The answers of a batch in the order of the questions: iterate over it.

    It takes questions only as there is room for them, so there may be any number. An error that
    concerns one question, such as a damaged image, is raised in place of its answer, and iterating
    goes on with the next one. Several threads may iterate at once.
    """

    def __init__(
        self,
        worker: Worker,
        model: RunningModel,
        kept: Callable[[], Kept],
        asked: Iterator[Asked],
        size: int,
    ) -> None:
        """
        Args:
            kept: called on the thread that computes.
            size: how many are decoded together.
        """
        self._worker = worker
        # What gives the images may ask for an answer: that is an error, and no wait without end.
        self._turn = RLock()
        self._table = _Table()
        self._steps = wired(_steps(self._table, model, kept, size))
        self._asked = asked
        self._begun = self._given = 0
        self._preparing: deque[tuple[int, Future[Any], Callable[[Any], Answer]]] = deque()
        self._pool = ThreadPoolExecutor(1, "fastvlm-prepare")
        self._over = False
        self._leave = finalize(self, _leave, worker, self._steps, self._pool)
        self._leave.atexit = False
        worker.opened(self._steps)

    def __iter__(self) -> Iterator[GenerationResult]:
        return self

    def __next__(self) -> GenerationResult:
        found = self._next(in_order=True)
        if found is None:
            raise StopIteration
        if isinstance(found[1], BaseException):
            raise found[1]
        return found[1]

    def completed(self) -> Iterator[tuple[int, GenerationResult | FastVLMError]]:
        """The answers as they end, each with the number of its question, which begin at 0.

        No answer waits for a longer one that was asked for before it. What is wrong with one
        question comes in place of its answer. It is meant instead of iterating, not beside it.
        """
        while (found := self._next(in_order=False)) is not None:
            index, done = found
            if isinstance(done, BaseException) and not isinstance(done, FastVLMError):
                raise done
            yield index, done

    def _next(self, *, in_order: bool) -> tuple[int, GenerationResult | BaseException] | None:
        """The next answer or what was wrong, with its question's number; None if all were given."""
        self._worker.check()
        done = self._table.done
        with self._turn:
            while not self._over:
                if done and (not in_order or self._given in done):
                    index = self._given if in_order else next(iter(done))
                    self._given += 1
                    return index, done.pop(index)
                self._prepare()
                if self._table.active or self._table.ready:
                    self._step()
                elif self._given == self._begun:
                    self.close()
        return None

    def _prepare(self) -> None:
        """Have the next images made ready, and take those that are; wait for one if need be."""
        while len(self._preparing) < _READY:
            try:
                asked = next(self._asked, None)
            except FastVLMError as error:
                self._table.done[self._begun] = error
                self._begun += 1
                break
            if asked is None or self._over:
                break
            self._preparing.append((self._begun, self._prepared(asked.prepare), asked.begin))
            self._begun += 1
        table = self._table
        while self._preparing and not table.ready:
            index, future, begin = self._preparing[0]
            if table.active and not future.done():
                break
            try:
                failed = future.exception()
            except CancelledError:
                # Another thread has closed it.
                break
            self._preparing.popleft()
            if failed is not None:
                table.done[index] = failed
                break
            table.ready.append((index, future.result(), begin))

    def _prepared(self, prepare: Callable[[], Any]) -> Future[Any]:
        try:
            return self._pool.submit(prepare)
        except RuntimeError:
            # A pool takes nothing more once the main thread has ended, while other threads are
            # still waiting for their answers; nor once it was closed.
            future: Future[Any] = Future()
            try:
                future.set_result(prepare())
            # Whatever it is, it is raised in place of the answer.
            except Exception as error:  # noqa: BLE001
                future.set_exception(error)
            return future

    def _step(self) -> None:
        if self._worker.run(next, self._steps, False) or self._over:
            return
        raise FastVLMError("the batch has failed before it had all answers: ask again")

    def close(self) -> None:
        """Give up the answers that have not come, and what they hold in memory."""
        self._over = True
        self._leave()


def _leave(worker: Worker, steps: Generator[bool], pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    worker.post(steps.close)


def _steps(
    table: _Table, model: RunningModel, kept: Callable[[], Kept], size: int
) -> Generator[bool]:
    """With each step begin one answer, or decode one token of all that have begun."""
    batch = Batch(model.language_model, ahead=model.lazy)
    active: list[tuple[int, Answer]] = []
    while True:
        if table.ready and len(active) < size:
            index, prepared, begin = table.ready.popleft()
            try:
                answer = begin(prepared)
                answer.continued.begin(model.language_model, kept())
            except FastVLMError as error:
                table.done[index] = error
            else:
                batch.join(answer.continued)
                active.append((index, answer))
        elif active:
            ended = []
            for place, (token, (index, answer)) in enumerate(
                zip(batch.advance(), active, strict=True)
            ):
                try:
                    answer.add(token)
                    if answer.ended:
                        answer.flush()
                        table.done[index] = answer.result()
                except FastVLMError as error:
                    table.done[index] = error
                if index in table.done:
                    ended.append(place)
            batch.leave(ended)
            active = [each for place, each in enumerate(active) if place not in ended]
        table.active = len(active)
        yield True
