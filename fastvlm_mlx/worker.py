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
Tasks = SimpleQueue[Task | None]

_END_S = 10.0  # longer than a token or a picture takes

# The process that the first worker began in. MLX has threads of its own, which a fork leaves behind
# likewise: a model can't be loaded anew there either.
_loader: int | None = None
_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_threads: set[threading.Thread] = set()


class Worker:
    """Runs tasks on a thread of its own, which starts with the first and ends with the worker.

    `concurrent.futures` would refuse work as soon as the main thread has ended, while others are
    still waiting for their answers, and has no way to leave work behind that takes no lock.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._tasks: Tasks = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._device = mx.default_device()
        self._running = threading.Lock()
        self._open: weakref.WeakSet[Generator[Any]] = weakref.WeakSet()
        self._ended = False
        weakref.finalize(self, self._tasks.put, None).atexit = False
        _workers.add(self)

    def check(self) -> None:
        """Raises FastVLMError: this process was forked from one that had loaded a model."""
        if os.getpid() != self._pid or _loader not in (None, os.getpid()):
            raise FastVLMError(
                "this process was forked from one that had loaded a model, and threads stay "
                "behind: start processes by spawn, or fork before the first model is loaded"
            )

    def run(self, task: Callable[..., T], *arguments: Any) -> T:
        """What `task` returns or raises; where this already is the worker's thread, at once."""
        if threading.current_thread() is self._thread:
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
        if self._ended:
            raise FastVLMError(
                "Python is about to end, and nothing is computed any more: let the main thread "
                "wait for the others"
            )
        if self._thread is None:
            global _loader
            _loader = os.getpid()
            with self._starting:
                if self._thread is None:
                    # A daemon, or Python would wait for it to end before `_end_all` is called.
                    self._thread = threading.Thread(
                        target=_work,
                        args=(self._tasks, self._running, self._device),
                        name="fastvlm",
                        daemon=True,
                    )
                    _threads.add(self._thread)
                    self._thread.start()
        future: Future[T] = Future()
        self._tasks.put((future, task, arguments))
        return future

    def post(self, task: Callable[[], None]) -> None:
        """Leave a task behind that nobody waits for. Takes no lock: the garbage collector calls."""
        if os.getpid() == self._pid and not self._ended:
            self._tasks.put((Future(), task, ()))

    def opened(self, steps: Generator[Any]) -> None:
        """Have a generator closed on the thread, should the interpreter end before it is."""
        self._open.add(steps)

    @property
    def thread(self) -> threading.Thread | None:
        return self._thread

    def end(self) -> None:
        """Wait for the task that is running, and let no other begin."""
        if os.getpid() != self._pid or self._thread is None:
            return
        self._ended = True
        with suppress(Empty):
            while (waiting := self._tasks.get_nowait()) is not None:
                waiting[0].cancel()
        for steps in list(self._open):
            self._tasks.put((Future(), steps.close, ()))
        last: Future[int] = Future()
        self._tasks.put((last, int, ()))
        last.result()
        self._running.acquire()
        # From the end of its last task to its next wait the thread needs a moment more.
        time.sleep(0.005)


def _work(tasks: Tasks, running: threading.Lock, device: mx.Device) -> None:
    """Refers to no worker, so that one that nobody has any more is collected."""
    mx.set_default_device(device)
    while (waiting := tasks.get()) is not None:
        future, task, arguments = waiting
        with running:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task(*arguments))
                # Whatever it is, it is whoever waits that it concerns.
                except BaseException as error:  # noqa: BLE001
                    future.set_exception(error)
            # Or they would live until the next task comes.
            del waiting, future, task, arguments
    mx.clear_streams()
    _threads.discard(threading.current_thread())


@atexit.register
def _end_all() -> None:
    """While the interpreter takes itself apart, a thread must neither be inside MLX nor end.

    Either would ask for the interpreter once more, and abort the process when it is refused. So
    each is left where it waits, which needs nothing; but for those whose worker nobody has any
    more, which are about to end.
    """
    workers = list(_workers)
    for worker in workers:
        worker.end()
    ending = _threads - {worker.thread for worker in workers}
    for thread in ending:
        thread.join(_END_S)
    if ending:
        # What MLX keeps for a thread goes after Python's part of it.
        time.sleep(0.005)
