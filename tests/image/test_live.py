"""Frames of a camera or a screen. A source of libav's that makes its frames stands for a device."""

import sys
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import av
import numpy as np
import pytest

from fastvlm_mlx.errors import ImageError, OptionError
from fastvlm_mlx.image import devices, live
from fastvlm_mlx.image.devices import Device

# A hundred frames in a second, each grey by its number.
COUNTED = (
    "color=black:size=64x64:rate=100,format=yuv444p,geq=lum='16+mod(N,200)':cb=128:cr=128,realtime"
)


@pytest.fixture
def device(monkeypatch):
    """Let every name stand for a source that libav makes."""

    def make(source):
        monkeypatch.setattr(live, "find", lambda name: Device("lavfi", source))

    return make


def number(frame):
    return round(float(np.asarray(frame.image).mean()) * 219 / 255)


def reading():
    return [each for each in threading.enumerate() if each.name == "fastvlm-live"]


def test_the_newest_frame_is_taken_and_those_before_it_are_dropped(device):
    device(COUNTED)
    numbers = []
    for frame in live.live("camera", every_s=0.01, count=4):
        numbers.append(number(frame))
        time.sleep(0.15)
    assert all((after - before) % 200 > 4 for before, after in pairwise(numbers))
    assert not reading()


def test_so_many_frames_at_a_rate_and_their_times(device):
    device("testsrc=size=320x240:rate=50,realtime")
    frames = live.live("screen", fps=10, count=3)
    assert frames.times_s == pytest.approx([0, 0.1, 0.2])
    taken = list(frames)
    assert [frame.image.size for frame in taken] == [(320, 240)] * 3
    assert [frame.time_s for frame in taken] == frames.times_s
    assert taken[0].time_s == 0
    assert taken[1].time_s >= 0.1
    assert taken[2].time_s >= 0.2


def test_one_who_leaves_closes_the_device(device):
    device(COUNTED)
    frames = iter(live.live("camera", every_s=1))
    next(frames)
    assert reading()
    frames.close()
    assert not reading()


def test_a_device_that_is_lost(device):
    device("testsrc=size=64x64:rate=20:duration=0.2,realtime")
    with pytest.raises(ImageError, match="camera has ended: check that it is still connected"):
        list(live.live("camera", every_s=0.1))
    assert not reading()


def test_a_device_that_is_silent(monkeypatch):
    monkeypatch.setattr(live, "SILENCE_S", 0.01)
    with pytest.raises(ImageError, match=r"camera:1 has sent no frame for 0.01 s"):
        live._Newest().take("camera:1")


def test_a_device_that_has_no_frame_yet_is_asked_again(device):
    device(COUNTED)
    newest, frames = live._Newest(), live.live("camera", fps=1)

    def decode(stream):
        raise BlockingIOError

    assert frames._decode(SimpleNamespace(decode=decode), None, newest)
    newest.close()
    assert not frames._decode(SimpleNamespace(decode=decode), None, newest)


def test_what_can_t_be_looked_at_is_a_sentence(device, monkeypatch):
    device("testsrc=size=64x64:rate=20,realtime")
    with pytest.raises(ImageError, match=r"frames of 64×64, over the limit of 4,095 pixels"):
        live.live("camera", fps=1, max_pixels=64 * 64 - 1)
    device("anullsrc")
    with pytest.raises(ImageError, match="camera sends no picture"):
        live.live("camera", fps=1)
    device("no_such_source")
    with pytest.raises(ImageError, match=r"camera can't be opened \(.+\): check that it is conn"):
        live.live("camera", fps=1)
    for wrong in ({}, {"fps": 1, "every_s": 1}, {"fps": 0}, {"fps": 1, "count": 0}):
        with pytest.raises(OptionError, match=r"--(frames|fps|every).*: expected"):
            live.live("camera", **wrong)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OptionError, match="needs av of the `video` extra"):
        live.live("camera", fps=1)


@pytest.mark.linux
def test_devices_on_linux(monkeypatch):
    monkeypatch.setattr(devices.os.path, "exists", lambda path: path == "/dev/video2")
    monkeypatch.setattr(devices, "glob", lambda _: ["/dev/video2", "/dev/video10", "/dev/videos"])
    assert devices.find("camera:2") == Device("v4l2", "/dev/video2")
    with pytest.raises(ImageError, match="no camera here: there is camera:2, camera:10"):
        devices.find("camera")
    monkeypatch.setenv("DISPLAY", "far:7.0")
    assert [devices.find(name).file for name in ("screen", "screen:1")] == ["far:7.0", "far:7.1"]
    monkeypatch.setenv("DISPLAY", "127.0.0.1:77")
    with pytest.raises(ImageError, match=r"screen can't be opened \(.+\): check"):
        live.live("screen", fps=1)
    monkeypatch.delenv("DISPLAY")
    with pytest.raises(ImageError, match="there is no screen, because DISPLAY is not set"):
        devices.find("screen")


def test_devices_on_a_mac(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(devices.sys, "platform", "darwin")
        patch.setattr(av.format, "ContainerFormat", lambda name, mode: None)
        names = ["FaceTime HD Camera", "Capture screen 0", "Capture screen 1", "Microphone"]
        listed = [
            SimpleNamespace(name=str(place), description=name, media_types=[kind])
            for place, (name, kind) in enumerate(zip(names, ["video"] * 3 + ["audio"], strict=True))
        ]
        patch.setattr(av, "enumerate_input_devices", lambda name: listed)
        assert devices.find("camera").file == "0:none"
        assert devices.find("camera").rates[0] == "30"
        assert devices.find("screen:1").file == "2:none"
        with pytest.raises(ImageError, match="no camera:1 here: there is camera:0"):
            devices.find("camera:1")
        listed.clear()
        with pytest.raises(ImageError, match="no camera here: connect one, or give a file"):
            devices.find("camera")


def test_elsewhere_and_in_another_build_of_pyav(monkeypatch):
    def missing(name, mode):
        raise ValueError(f"no container format {name!r}")

    monkeypatch.setattr(av.format, "ContainerFormat", missing)
    with pytest.raises(OptionError, match="this PyAV was built without"):
        devices.find("camera")
    monkeypatch.setattr(devices.sys, "platform", "win32")
    with pytest.raises(OptionError, match="on macOS and Linux only"):
        devices.find("camera")


def test_a_device_is_asked_for_another_rate(monkeypatch):
    asked = []

    def at_rate(device, rate):
        asked.append(rate)
        if rate != "25":
            raise av.error.OSError(5, "Input/output error")
        return "opened"

    monkeypatch.setattr(devices, "_at_rate", at_rate)
    assert devices.opened(Device("avfoundation", "0", ("30", "25", "15"))) == "opened"
    assert asked == ["30", "25"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("camera", True), ("screen:12", True), ("./camera", False), ("camera:", False), (7, False)],
)
def test_which_names_are_devices(name, said):
    assert devices.is_live(name) == said
    if not said and isinstance(name, str):
        with pytest.raises(OptionError, match="is no device"):
            devices.find(name)
