"""Frames of a video at even distances, upright and in RGB, each with its time; through PyAV.

A clip is first read without decoding it: the times of its packets say how long it is and which
frames it has, whatever its header says. Then only the frames that were chosen are kept.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastvlm_mlx.errors import ImageError, PromptError, escaped, printable
from fastvlm_mlx.extras import needs_extra
from fastvlm_mlx.image.decode import DEFAULT_MAX_PIXELS, check_max_pixels
from fastvlm_mlx.image.frame_times import Choice, Index, clocks
from fastvlm_mlx.image.rgb import to_rgb

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Containers of one file. Playlists (hls, dash, concat) would have others opened, and images are
# none: they go the way of images.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,gif,apng,ogg,asf,h264,"
    "hevc,ivf,obu,m4v,mxf,nut,dv,yuv4mpegpipe"
)
# Frames of a clip whose times are kept: eight bytes each, 92 hours at 30 a second.
MAX_FRAMES = 10_000_000
# What a decoder allocates beside the pixels themselves, in pixels: rows and columns of its blocks.
_AROUND = 1 << 20
_MAX_NAME = 300


def frames(
    path: str | os.PathLike[str],
    *,
    count: int | None = None,
    fps: float | None = None,
    every_s: float | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Frames:
    """Choose frames of a video file; iterating over them decodes it.

    Args:
        count: so many, each shown in the middle of one of as many equal parts of the clip; all
            frames of a clip that has fewer.
        fps: those shown at 0, 1/fps, 2/fps … seconds.
        every_s: those shown at 0, every_s, 2 · every_s … seconds.
        max_pixels: width × height of a frame at most, known before one is decoded.

    Raises:
        ImageError: nothing there, no video, a damaged one, or one with too many pixels; while
            iterating, too.
        OptionError: not exactly one of count, fps and every_s, or it is no positive number; PyAV
            of the `video` extra is missing.
    """
    choice = Choice.checked(count, fps, every_s)
    try:
        file = Path(os.fsdecode(path)).expanduser()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImageError(
            f"the video's path, of type {type(path).__name__}, can't be read: give the path of a "
            "video"
        ) from error
    return Frames(file, choice, check_max_pixels(max_pixels))


def video_messages(
    frames: Iterable[Frame], prompt: str, system: str | None = None, detail: str = "auto"
) -> list[dict[str, Any]]:
    """The frames as messages for `FastVLM.chat`: each after a line with its time, such as "0:03",
    and then the prompt.

    Args:
        frames: all are taken before this returns; what is in the place of an image, features say,
            stays as it is.
        system: replaces the model's system message.
        detail: of every frame, as `FastVLM.encode` takes it.

    Raises:
        PromptError: the prompt is empty.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError("the prompt is empty: say what to do with the video")
    taken = list(frames)
    chosen = {} if detail == "auto" else {"detail": detail}
    parts: list[dict[str, Any]] = []
    for frame, clock in zip(taken, clocks([frame.time_s for frame in taken]), strict=True):
        parts += [
            {"type": "text", "text": f"{clock}\n"},
            {"type": "image", "image": frame.image, **chosen},
            {"type": "text", "text": "\n"},
        ]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
    return [user] if system is None else [{"role": "system", "content": system}, user]


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        time_s: when it is shown, in seconds after the first frame.
        image: 8-bit RGB, upright; or what stands for it in `video_messages`.
    """

    time_s: float
    image: Any


class Frames:
    """The frames that were chosen of a clip; iterate over it, as often as need be.

    Each iteration decodes anew, and holds one frame beside the one that it has given.

    Attributes:
        times_s: when they are shown, as the clip's packets have it. A frame that the decoder does
            not show is replaced by the one before it, which may be chosen already: then there are
            fewer frames than times.
    """

    def __init__(self, path: Path, choice: Choice, max_pixels: int) -> None:
        self._path, self._max_pixels = path, max_pixels
        self._name = printable(escaped(path), _MAX_NAME)
        self._index = self._scan()
        self._chosen = choice.of(self._index)
        self._seeks = self._index.timed

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def times_s(self) -> list[float]:
        return [self._index.seconds(position) for position in self._chosen]

    def __iter__(self) -> Iterator[Frame]:
        decoded = self._decode()
        shown: tuple[int, VideoFrame] | None = None
        coming: tuple[int, VideoFrame] | None = None
        given: int | None = None
        try:
            for wanted in self._chosen:
                key = self._index.worth_seeking(shown[0] if shown else None, wanted)
                if key is not None and self._seeks:
                    decoded.close()
                    decoded, shown, coming = self._decode(key), None, None
                while shown is None or shown[0] < wanted:
                    coming = coming or next(decoded, None)
                    if coming is None or (shown and coming[0] > wanted):
                        break
                    shown, coming = coming, None
                if shown is None:
                    raise self._error("has no frame that can be decoded", "give another clip")
                if shown[0] != given:
                    given = shown[0]
                    yield Frame(self._index.seconds(given), self._image(shown[1]))
        finally:
            decoded.close()

    def _decode(self, key: int | None = None) -> Generator[tuple[int, VideoFrame]]:
        """Frames in the order in which they are shown, with their positions.

        Args:
            key: the position of a keyframe to begin with; None begins with the first frame.
        """
        with self._opened() as (container, stream):
            if key is not None and not self._found(container, stream, key):
                self._seeks = False
                yield from self._decode()
                return
            with self._damage():
                for number, frame in enumerate(container.decode(stream)):
                    if frame.width * frame.height > self._max_pixels:
                        raise self._too_large(frame.width, frame.height)
                    position = (
                        _position(frame) if self._index.timed else self._index.numbered(number)
                    )
                    # Frames that refer to what lies before the keyframe come out broken.
                    if position is not None and (key is None or position >= key):
                        yield position, frame

    def _found(self, container: InputContainer, stream: VideoStream, key: int) -> bool:
        """Seek, and say whether what comes next begins at the keyframe or before it. Some formats
        find their place by guessing."""
        with self._damage():
            container.seek(key, stream=stream)
            first = next(container.demux(stream), None)
            at = None if first is None else _position(first)
            if first is None or at is None or at > key or not first.is_keyframe:
                return False
            container.seek(key, stream=stream)
        return True

    def _image(self, frame: VideoFrame) -> Image.Image:
        if getattr(frame, "is_corrupt", False):
            raise self._error("holds a damaged frame", "get it again")
        with self._damage():
            return to_image(frame)

    def _scan(self) -> Index:
        positions, keys = array("q"), array("q")
        reordered, untimed, last_duration, count = False, False, 0, 0
        latest: int | None = None
        with self._opened() as (container, stream), self._damage():
            time_base = stream.time_base
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            for packet in container.demux(stream):
                # The empty one at the end flushes the decoder.
                if not packet.size or packet.is_discard:
                    continue
                if packet.is_corrupt:
                    raise self._error("ends in the middle of a frame", "get it again, whole")
                count += 1
                if count > MAX_FRAMES:
                    raise self._error(f"has more than {MAX_FRAMES:,} frames", "cut it")
                position = _position(packet)
                if position is None:
                    untimed = True
                    continue
                if packet.pts is None or container.format.name == "avi":
                    # Of AVI libav knows the order of decoding only, whatever it says.
                    reordered |= bool(stream.codec_context.has_b_frames)
                positions.append(position)
                if packet.is_keyframe:
                    keys.append(position)
                if latest is None or position >= latest:
                    latest, last_duration = position, packet.duration or 0
        if not count:
            raise self._error("holds no frames", "give a clip with a picture")
        if untimed or not time_base:
            return Index(np.arange(count), np.array([], np.int64), 1, 1 / Fraction(rate), False)
        shown = np.unique(np.frombuffer(positions, np.int64))
        if not last_duration:
            span = int(shown[-1]) - int(shown[0])
            last_duration = max(1, span // max(1, len(shown) - 1))
        keyframes = np.sort(np.frombuffer(keys, np.int64)) if keys else np.array([], np.int64)
        return Index(shown, keyframes, last_duration, Fraction(time_base), not reordered)

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        with needs_extra():
            import av
        try:
            mode = self._path.stat().st_mode
            # Before it is opened: a pipe would wait for somebody to write.
            if not (S_ISREG(mode) or S_ISDIR(mode)):
                raise self._error("is no regular file", "give the path of a video")
            file = self._path.open("rb")
        except FileNotFoundError as error:
            raise self._error("does not exist", "give the path of a video") from error
        except IsADirectoryError as error:
            raise self._error("is a directory", "give the path of a video in it") from error
        except (OSError, ValueError) as error:
            reason = printable(getattr(error, "strerror", None) or error, _MAX_NAME)
            raise self._error(f"can't be opened ({reason})", "check the path") from error
        with file:
            if not os.fstat(file.fileno()).st_size:
                raise self._error("is empty, zero bytes", "expected a video")
            try:
                # A file and no path: of a path libav would make a protocol.
                container = av.open(
                    file,
                    mode="r",
                    options={"max_pixels": str(self._max_pixels + _AROUND)},
                    container_options={"format_whitelist": FORMATS, "protocol_whitelist": "none"},
                    metadata_errors="replace",
                )
            except (av.FFmpegError, ValueError, MemoryError, AssertionError) as error:
                raise self._error(
                    "is no video that can be read, or not a whole one",
                    "give an MP4, MOV, MKV, WebM or AVI, and an image with --image",
                ) from error
            with container:
                if not container.streams.video:
                    raise self._error(
                        "has no picture, sound only", "expected a video with frames to look at"
                    )
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise self._error(
                        "has a picture that can't be decoded here", "convert it to H.264"
                    )
                width, height = stream.codec_context.width, stream.codec_context.height
                if width * height > self._max_pixels:
                    raise self._too_large(width, height)
                yield container, stream

    @contextmanager
    def _damage(self) -> Iterator[None]:
        import av

        try:
            yield
        except MemoryError as error:
            raise self._error("needs more memory than there is", "shrink it") from error
        except (av.FFmpegError, ValueError, OSError, OverflowError) as error:
            reason = printable(getattr(error, "strerror", None) or error, _MAX_NAME)
            raise self._error(
                f"can't be decoded ({reason})", "the file is damaged, get it again"
            ) from error

    def _too_large(self, width: int, height: int) -> ImageError:
        limit = self._max_pixels / 1e6
        return self._error(
            f"is {width}×{height}, {width * height / 1e6:.4g} megapixels, over the limit of "
            f"{limit:.4g}",
            "shrink it, or raise the limit (--max-pixels)",
        )

    def _error(self, found: str, remedy: str) -> ImageError:
        return ImageError(f"{self._name} {found}: {remedy}")


def to_image(frame: VideoFrame) -> Image.Image:
    """A decoded frame in 8-bit RGB, upright, over white."""
    alpha = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    # The matrix and the range that the frame says, or BT.601 and limited, as ffmpeg has it.
    pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    return _upright(to_rgb(Image.fromarray(pixels)), frame)


def _position(of: Packet[Any] | VideoFrame) -> int | None:
    """When it is shown, in units of its stream; or when it is decoded, if that is all there is."""
    return of.pts if of.pts is not None else of.dts


def _upright(image: Image.Image, frame: VideoFrame) -> Image.Image:
    """Turn and mirror as the display matrix says, which phones write."""
    # av's stubs call the side data a mapping, which iterates over itself.
    sides: Iterable[Any] = frame.side_data
    matrix = next((bytes(side) for side in sides if side.type.name == "DISPLAYMATRIX"), b"")
    if len(matrix) < 36:
        return image
    # x' = a·x + c·y and y' = b·x + d·y
    a, b, _, c, d = (int(v) for v in np.frombuffer(matrix, "=i4")[:5])
    if abs(b) > abs(a):
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image
