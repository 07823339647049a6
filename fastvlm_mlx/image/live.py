"""Frames of a camera or of the screen as they come, the newest one at a time; through PyAV.

A device sends frames faster than a model looks at them. A thread takes each and keeps the newest
alone, so what is looked at is never older than the last frame, however long the one before took.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Thread
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import ImageError, printable
from fastvlm_mlx.extras import needs_extra
from fastvlm_mlx.image.decode import DEFAULT_MAX_PIXELS, check_max_pixels
from fastvlm_mlx.image.devices import SILENCE_S, find, opened
from fastvlm_mlx.image.frame_times import Choice
from fastvlm_mlx.image.video import Frame, to_image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_MAX_REASON = 200


def live(
    name: str,
    *,
    every_s: float | None = None,
    fps: float | None = None,
    count: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Live:
    """Find a camera or a screen; iterating over the result looks at it.

    Args:
        name: "camera" or "screen"; "camera:1" is the second camera.
        every_s: a frame in so many seconds; if a frame takes longer to be looked at, the next one
            is the newest then.
        fps: so many in a second, in place of `every_s`.
        count: end after so many; without it there is no end.
        max_pixels: width × height of a frame at most.

    Raises:
        ImageError: there is no such device, it can't be opened, it sends no frames or too large
            ones; while iterating, too.
        OptionError: not exactly one of every_s and fps, or a number that is none; PyAV of the
            `video` extra is missing, or was built without such devices.
    """
    if count is not None:
        Choice.checked(count, None, None)
    step = Choice.checked(None, fps, every_s).every_s
    return Live(name, float(step or 0), count, check_max_pixels(max_pixels))


class Live:
    """The frames of a device. Each iteration opens it anew, and closes it at its end.

    Attributes:
        times_s: of a number of frames, when they were taken, in seconds after the first; or before
            that when they will be.
    """

    def __init__(self, name: str, every_s: float, count: int | None, max_pixels: int) -> None:
        self._name, self._every_s, self._count = name, every_s, count
        self._max_pixels = max_pixels
        self.times_s = [number * every_s for number in range(count or 0)]
        with self._opened():
            pass

    def __iter__(self) -> Iterator[Frame]:
        newest, times_s = _Newest(), list[float]()
        reader = Thread(target=self._read, args=(newest,), name="fastvlm-live", daemon=True)
        reader.start()
        try:
            frame = newest.take(self._name)
            begun, tick, time_s = time.monotonic(), 0, 0.0
            while True:
                with self._failures("sent a frame that can't be read"):
                    image = to_image(frame)
                yield Frame(time_s, image)
                if self._count is not None:
                    times_s.append(time_s)
                    if len(times_s) == self._count:
                        self.times_s = times_s
                        return
                # The next time that is not over yet, or now if a frame took longer than that.
                late = (time.monotonic() - begun) / self._every_s
                tick = max(tick + 1, int(late))
                time.sleep(max(0.0, begun + tick * self._every_s - time.monotonic()))
                frame = newest.take(self._name)
                time_s = time.monotonic() - begun
        finally:
            newest.close()
            # It ends with its next frame; one that waits for a device that is silent is left.
            reader.join(1.0)

    def _read(self, newest: _Newest) -> None:
        try:
            with self._opened() as (container, stream), self._failures("was lost"):
                while self._decode(container, stream, newest):
                    # A device that has no frame yet.
                    time.sleep(0.005)
        # Whatever it is, it is raised where the frames are taken.
        except BaseException as error:  # noqa: BLE001
            newest.fail(error)

    def _decode(self, container: InputContainer, stream: VideoStream, newest: _Newest) -> bool:
        """Keep the newest frame until nobody wants one; return True if there is none yet."""
        try:
            for frame in container.decode(stream):
                if not newest.put(frame):
                    return False
        except BlockingIOError:
            return newest.wanted
        raise ImageError(f"{self._name} has ended: check that it is still connected")

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        with needs_extra():
            device = find(self._name)
        with self._failures("can't be opened"):
            container = opened(device)
        with container:
            if not container.streams.video:
                raise ImageError(f"{self._name} sends no picture: choose another device")
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > self._max_pixels:
                raise ImageError(
                    f"{self._name} sends frames of {width}×{height}, over the limit of "
                    f"{self._max_pixels:,} pixels: raise the limit (--max-pixels)"
                )
            yield container, stream

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        import av

        try:
            yield
        except ImageError:
            raise
        except (av.FFmpegError, ValueError, OSError) as error:
            reason = printable(getattr(error, "strerror", None) or error, _MAX_REASON)
            raise ImageError(
                f"{self._name} {what} ({reason}): check that it is connected, that no other "
                "program uses it, and that this terminal may use it"
            ) from error


class _Newest:
    """The newest frame of a device, for one taker."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._frame: VideoFrame | None = None
        self._error: BaseException | None = None
        self.wanted = True

    def put(self, frame: VideoFrame) -> bool:
        """Replace the frame that nobody has taken; return whether more are wanted."""
        with self._changed:
            self._frame = frame
            self._changed.notify()
            return self.wanted

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify()

    def take(self, name: str) -> VideoFrame:
        """The newest frame; wait for one that was not taken yet.

        Raises:
            ImageError: there comes none.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._error, SILENCE_S)
            frame, self._frame = self._frame, None
            if frame is not None:
                return frame
            if self._error is not None:
                raise self._error
        raise ImageError(
            f"{name} has sent no frame for {SILENCE_S:g} s: check that it is switched on"
        )

    def close(self) -> None:
        with self._changed:
            self.wanted = False
