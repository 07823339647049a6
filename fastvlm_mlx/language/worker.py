"""The one thread of a loaded model, on which everything that it computes is computed.

What MLX has not evaluated yet belongs to a stream, and a stream to the thread that made it: a cache
that one thread began can't be continued by another. So callers hand in tasks, which run one after
the other in the order of their coming, and wait for what comes out.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

from fastvlm_mlx.errors import FastVLMError

T = TypeVar("T")
Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]
# Putting is reentrant, so what the garbage collector ends may put while something else does.
Tasks = SimpleQueue[Task]


class _Lane:
    """A thread, and the queue that it takes its tasks from, for as long as the process lives.

    MLX keeps a thread of its own for every stream of every thread that computed something, whether
    or not that has ended. So a thread never ends, and serves one worker after the other.
    """

    def __init__(self) -> None:
        self.tasks: Tasks = SimpleQueue()
        self.running = threading.Lock()
        self.open: weakref.WeakSet[Generator[Any]] = weakref.WeakSet()
        # A daemon, or Python would wait for it to end before `_end_all` is called.
        arguments = (self.tasks, self.running)
        self.thread = threading.Thread(target=_work, args=arguments, name="fastvlm", daemon=True)
        self.thread.start()

    def end(self) -> None:
        """Wait for the task that is running, and let no other begin."""
        with suppress(Empty):
            while True:
                self.tasks.get_nowait()[0].cancel()
        for steps in list(self.open):
            self.tasks.put((Future(), steps.close, ()))
        last: Future[int] = Future()
        self.tasks.put((last, int, ()))
        last.result()
        self.running.acquire()
        # From the end of its last task to its next wait the thread needs a moment more.
        time.sleep(0.005)


# The process that the first worker began in. MLX has threads of its own, which a fork leaves behind
# likewise: a model can't be loaded anew there either.
_loader: int | None = None
_lanes: list[_Lane] = []
_idle: deque[_Lane] = deque()
_over = False  # whether the interpreter is about to end


class Worker:
    """Runs tasks on one thread, which is its alone from the first task until it is collected.

    `concurrent.futures` would refuse work as soon as the main thread has ended, while others are
    still waiting for their answers, and has no way to leave work behind that takes no lock.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._starting = threading.Lock()
        self._device = mx.default_device()
        # Of one lane at most. The collector hands it on.
        self._lane: list[_Lane] = []
        self._ended = False
        weakref.finalize(self, _idle.extend, self._lane).atexit = False

    def check(self) -> None:
        """Raises FastVLMError: this process was forked from one that had loaded a model."""
        if os.getpid() != self._pid or _loader not in (None, os.getpid()):
            raise FastVLMError(
                "this process was forked from one that had loaded a model, and threads stay "
                "behind: start processes by spawn, or fork before the first model is loaded"
            )

    def run(self, task: Callable[..., T], *arguments: Any) -> T:
        """What `task` returns or raises; where this already is the worker's thread, at once."""
        if self._lane and threading.current_thread() is self._lane[0].thread:
            return task(*arguments)
        future = self.submit(task, *arguments)
        try:
            return future.result()
        finally:
            # Of use when the waiting was interrupted and the task has not begun.
            future.cancel()

    def submit(self, task: Callable[..., T], *arguments: Any) -> Future[T]:
        """Raises FastVLMError: as `check`, or the interpreter is about to end."""
        self.check()
        if self._ended or _over:
            raise FastVLMError(
                "Python is about to end, and nothing is computed any more: let the main thread "
                "wait for the others"
            )
        if not self._lane:
            self._begin()
        future: Future[T] = Future()
        self._lane[0].tasks.put((future, task, arguments))
        return future

    def _begin(self) -> None:
        global _loader
        _loader = os.getpid()
        with self._starting:
            if self._lane:
                return
            try:
                lane = _idle.popleft()
            except IndexError:
                lane = _Lane()
                _lanes.append(lane)
            lane.tasks.put((Future(), mx.set_default_device, (self._device,)))
            self._lane.append(lane)

    def post(self, task: Callable[[], None]) -> None:
        """Leave a task behind that nobody waits for. Takes no lock: the garbage collector calls."""
        if os.getpid() == self._pid and self._lane and not _over:
            self._lane[0].tasks.put((Future(), task, ()))

    def opened(self, steps: Generator[Any]) -> None:
        """Have a generator closed on the thread, should the interpreter end before it is."""
        if self._lane:
            self._lane[0].open.add(steps)

    def end(self) -> None:
        """Wait for the task that is running, and let no other begin."""
        self._ended = True
        if os.getpid() == self._pid and self._lane:
            lane = self._lane.pop()
            _lanes.remove(lane)
            lane.end()


def _work(tasks: Tasks, running: threading.Lock) -> None:
    """Refers to no worker, so that one that nobody has any more is collected."""
    while True:
        future, task, arguments = tasks.get()
        with running:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task(*arguments))
                # Whatever it is, it is whoever waits that it concerns.
                except BaseException as error:  # noqa: BLE001
                    future.set_exception(error)
            # Or they would live until the next task comes.
            del future, task, arguments


@atexit.register
def _end_all() -> None:
    """While the interpreter takes itself apart, a thread must neither be inside MLX nor end.

    Either would ask for the interpreter once more, and abort the process when it is refused. So
    each is left where it waits, which needs nothing.
    """
    global _over
    _over = True
    if _loader == os.getpid():
        for lane in _lanes:
            lane.end()
