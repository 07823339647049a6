"""Cameras and screens by name, as libav finds them on this system."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import ImageError, OptionError, printable

if TYPE_CHECKING:
    from av.container import InputContainer

_NAME = re.compile(r"(camera|screen)(?::([0-9]{1,3}))?")
# Seconds without a frame after which a device is given up.
SILENCE_S = 10.0
# Frames of a screen in a second: each is a copy of all its pixels.
_SCREEN_RATE = "10"


@dataclass(frozen=True)
class Device:
    """What libav is to open.

    Attributes:
        format: libav's name for devices of this kind.
        file: which of them.
        rates: frames in a second to ask for, until it takes one; None leaves it to the device.
    """

    format: str
    file: str
    rates: tuple[str | None, ...] = (None,)


def is_live(path: object) -> bool:
    """Whether a video is a device: "camera" or "screen", or with a number, as "camera:1". A file of
    that name is "./camera"."""
    return isinstance(path, str) and _NAME.fullmatch(path) is not None


def find(name: str) -> Device:
    """The device of a name.

    Raises:
        ImageError: there is none.
        OptionError: PyAV was built without such devices, or this system has none that it knows.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise OptionError(
            f"{printable(name, 60)} is no device: expected camera, screen, or one with a number as "
            "camera:1"
        )
    kind, number = parts.groups()
    place = int(number or 0)
    if sys.platform == "darwin":
        return _on_a_mac(kind, place, name)
    if not sys.platform.startswith("linux"):
        raise OptionError(f"{name} can be looked at on macOS and Linux only: give a file")
    if kind == "camera":
        _check_format("v4l2")
        file = f"/dev/video{place}"
        if not os.path.exists(file):
            numbers = sorted(int(path[10:]) for path in glob("/dev/video*") if path[10:].isdigit())
            raise _no_such(name, [f"camera:{number}" for number in numbers])
        return Device("v4l2", file)
    _check_format("x11grab")
    display = os.environ.get("DISPLAY")
    if not display:
        raise ImageError(
            f"there is no {name}, because DISPLAY is not set: run this in a session of X11"
        )
    # The number of the screen is what stands after the point.
    base = re.sub(r"\.[0-9]+$", "", display) if number else display
    return Device("x11grab", f"{base}.{place}" if number else base, (_SCREEN_RATE,))


def _on_a_mac(kind: str, place: int, name: str) -> Device:
    import av

    _check_format("avfoundation")
    # Cameras come first, and then the screens, in one list.
    videos = [d for d in av.enumerate_input_devices("avfoundation") if "video" in d.media_types]
    screen = kind == "screen"
    found = [d for d in videos if d.description.startswith("Capture screen") == screen]
    if place >= len(found):
        raise _no_such(name, [f"{kind}:{number}" for number in range(len(found))])
    # libav's own rate of 29.97 is one that few cameras have.
    rates = (_SCREEN_RATE,) if screen else ("30", "60", "25", "15")
    return Device("avfoundation", f"{found[place].name}:none", rates)


def _check_format(name: str) -> None:
    import av

    try:
        av.format.ContainerFormat(name, "r")
    except ValueError as error:
        raise OptionError(
            f"this PyAV was built without {name}, which such a device needs: install the wheel of "
            "av from PyPI, or give a file"
        ) from error


def _no_such(name: str, others: list[str]) -> ImageError:
    hint = f"there is {', '.join(others)}" if others else "connect one, or give a file"
    return ImageError(f"there is no {name} here: {hint}")


def opened(device: Device) -> InputContainer:
    """Raises FFmpegError: it can't be opened."""
    import av

    *others, last = device.rates
    for rate in others:
        with suppress(av.FFmpegError):
            return _at_rate(device, rate)
    return _at_rate(device, last)


def _at_rate(device: Device, rate: str | None) -> InputContainer:
    import av

    return av.open(
        device.file,
        mode="r",
        format=device.format,
        container_options={} if rate is None else {"framerate": rate},
        timeout=SILENCE_S,
    )
