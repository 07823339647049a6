"""Ctrl-C and its like during an export: nothing half done stays, whoever catches them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Called with the stage's name and, where it is known, the share of it that is done.
Progress = Callable[[str, float | None], None]

# torch.export and coremltools keep what they are at in one place for the whole process.
ONE_AT_A_TIME = threading.RLock()


@contextmanager
def interruptible(progress: Progress | None) -> Iterator[Progress]:
    """A progress callback that raises the interruption that somebody else caught, and hands on to
    `progress` if there is one.

    coremltools catches whatever its imports raise, and a Ctrl-C during one of them is lost. SIGTERM
    and SIGHUP unwind like Ctrl-C, so that nothing is left behind; a second signal changes nothing.
    """
    pressed: BaseException | None = None

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed is None:
            interrupt = number == signal.SIGINT
            pressed = KeyboardInterrupt() if interrupt else SystemExit(128 + number)
            raise pressed

    def stage(name: str, done: float | None) -> None:
        if pressed is not None:
            raise pressed
        if progress is not None:
            progress(name, done)

    # Only the main thread may set handlers, and a caller's own are left alone.
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, handler)
    try:
        yield stage
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def counted(progress: Progress, total: int) -> Callable[[int], None]:
    """A callback for bytes of the language model just written, of `total`."""
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        progress("language model", written / total)

    progress("language model", 0.0)
    return advance
