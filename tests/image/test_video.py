"""Frames of a video: which ones, at which times, upright and in their colours."""

import os
import struct
import sys
from contextlib import suppress
from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.errors import ImageError, OptionError, PromptError
from fastvlm_mlx.image import frame_times
from fastvlm_mlx.image.frame_times import clocks
from fastvlm_mlx.image.video import Frame, frames, video_messages

# The grey level of a frame is its number times this.
STEP = 6
RATE = 10
MIDDLES = [2, 7, 12, 17, 22, 27, 32, 37]


def write(path, codec="libx264", pixels=None, times=range(40), pix_fmt="yuv420p", **context):
    """A clip of 40 frames, each grey by its number; or of others."""
    rate = 25 if codec == "mpeg2video" else RATE
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = (64, 64) if pixels is None else pixels.shape[1::-1]
        stream.pix_fmt = pix_fmt
        context = {"gop_size": 8, **context}
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if codec == "libx264":
            stream.options = {"crf": "1"}
        wanted = {f"dst_{k}": context[k] for k in ("colorspace", "color_range") if k in context}
        for number, time in enumerate(times):
            grey = np.full((64, 64, 3), STEP * (number % 40), np.uint8)
            found = grey if pixels is None else pixels
            mode = "rgba" if found.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(found, format=mode)
            frame = frame.reformat(format=pix_fmt, **wanted)
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4")


def number(frame):
    return round(float(np.asarray(frame.image)[:, :, 1].mean()) / STEP)


def found(path, **choice):
    return [(number(frame), round(frame.time_s, 3)) for frame in frames(path, **choice)]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mp4", "mpeg4"),
        ("a.mov", "libx264"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        # libav makes up times in AVI, in the wrong order where frames are reordered.
        ("a.avi", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.ts", "libx264"),
        ("a.mpg", "mpeg2video"),
        ("a.flv", "libx264"),
        # No times at all.
        ("a.h264", "libx264"),
    ],
)
@pytest.mark.parametrize("seeks", [True, False])
def test_the_frames_in_the_middles_of_equal_parts(tmp_path, monkeypatch, name, codec, seeks):
    monkeypatch.setattr(frame_times, "_WORTH_SEEKING", 1 if seeks else 10**6)
    path = write(tmp_path / name, codec)
    rate = 25 if name in ("a.mpg", "a.h264") else RATE
    chosen = frames(path, count=8)
    assert [number(frame) for frame in chosen] == MIDDLES
    assert [frame.time_s for frame in chosen] == pytest.approx([n / rate for n in MIDDLES])
    assert chosen.times_s == pytest.approx([n / rate for n in MIDDLES])
    assert len(chosen) == 8


def test_only_what_lies_behind_a_keyframe_is_decoded(tmp_path):
    path = write(tmp_path / "long.mp4", times=range(400), gop_size=20)
    chosen = frames(path, count=4)
    begun = []
    decode = chosen._decode

    def counted(key=None):
        for frame in decode(key):
            begun.append(frame[0])
            yield frame

    chosen._decode = counted
    assert [round(frame.time_s, 3) for frame in chosen] == [5.0, 15.0, 25.0, 35.0]
    assert len(begun) <= 4 * 21


def test_at_so_many_frames_a_second_and_every_so_many_seconds(clip):
    seconds = [(0, 0.0), (10, 1.0), (20, 2.0), (30, 3.0)]
    assert found(clip, fps=1) == found(clip, every_s=1) == seconds
    assert found(clip, fps=0.5) == seconds[::2]
    assert found(clip, every_s=0.7) == [(n, n / 10) for n in range(0, 40, 7)]


@pytest.mark.parametrize("choice", [{"count": 41}, {"count": 10**15}, {"fps": 10}, {"fps": 1e6}])
def test_no_frame_is_given_twice(clip, choice):
    assert found(clip, **choice) == [(n, n / 10) for n in range(40)]


def test_a_variable_frame_rate(tmp_path):
    path = write(tmp_path / "clip.mp4", times=[0, 1, 2, 30, 31, 40])
    assert found(path, fps=1) == [(0, 0.0), (2, 0.2), (3, 3.0), (5, 4.0)]


def test_times_count_from_the_first_frame_and_no_header_is_believed(tmp_path):
    path = write(tmp_path / "a.mkv", times=range(100, 140))
    data = path.read_bytes()
    # The duration of 14.0 s, a double in milliseconds; then of 1000 hours, and none.
    at = data.index(b"\x44\x89\x88") + 3
    for lie in (struct.pack(">d", 3.6e9), bytes(8)):
        path.write_bytes(data[:at] + lie + data[at + 8 :])
        assert found(path, count=8) == [(n, n / 10) for n in MIDDLES]


def test_frames_are_decoded_as_they_are_asked_for_and_again(clip):
    chosen = frames(clip, count=8)
    assert [number(frame) for frame in islice(chosen, 2)] == MIDDLES[:2]
    assert [number(frame) for frame in chosen] == MIDDLES


ONE = 1 << 16
CORNERS = np.zeros((48, 64, 3), np.uint8)
CORNERS[:24, :32], CORNERS[:24, 32:], CORNERS[24:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((ONE, 0, 0, ONE), lambda a: a),
        # Clockwise by a quarter, by a half, by three quarters; and mirrored.
        ((0, ONE, -ONE, 0), lambda a: np.rot90(a, -1)),
        ((-ONE, 0, 0, -ONE), lambda a: np.rot90(a, 2)),
        ((0, -ONE, ONE, 0), lambda a: np.rot90(a, 1)),
        ((-ONE, 0, 0, ONE), lambda a: a[:, ::-1]),
        ((0, ONE, ONE, 0), lambda a: a.transpose(1, 0, 2)),
    ],
)
def test_upright(tmp_path, matrix, turned):
    path = write(tmp_path / "a.mp4", pixels=CORNERS, times=range(2), pix_fmt="yuv444p")
    data = path.read_bytes()
    a, b, c, d = matrix
    at = data.index(struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    path.write_bytes(
        data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]
    )
    (frame,) = frames(path, count=1)
    expected = turned(CORNERS).astype(int)
    assert np.asarray(frame.image).shape == expected.shape
    assert np.abs(np.asarray(frame.image) - expected).mean() < 8


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize(("colorspace", "color_range"), [(1, 1), (1, 2), (5, 1), (9, 1)])
def test_colours_by_the_matrix_and_the_range_that_the_clip_says(
    tmp_path, pix_fmt, colorspace, color_range
):
    path = write(
        tmp_path / "a.mp4",
        pixels=CORNERS,
        times=range(1),
        pix_fmt=pix_fmt,
        colorspace=colorspace,
        color_range=color_range,
    )
    (frame,) = frames(path, count=1)
    pixels = np.asarray(frame.image).astype(int)
    for y, x in ((8, 8), (8, 56), (40, 8), (40, 56)):
        assert np.abs(pixels[y, x] - CORNERS[y, x]).max() <= 4


def test_what_is_transparent_is_white(tmp_path):
    clear = np.concatenate([CORNERS, np.zeros((48, 64, 1), np.uint8)], 2)
    path = write(tmp_path / "a.mov", "qtrle", clear, range(1), "argb")
    (frame,) = frames(path, count=1)
    assert np.asarray(frame.image).min() == 255


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class TestWhatIsNoVideo:
    def test_sound_only(self, tmp_path):
        sound(tmp_path / "a.mp4")
        with pytest.raises(ImageError, match="has no picture, sound only"):
            frames(tmp_path / "a.mp4", count=1)

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff"])
    def test_an_image(self, tmp_path, name):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
        with pytest.raises(ImageError, match=r"an image with --image$"):
            frames(tmp_path / name, count=1)

    @pytest.mark.parametrize(
        "text",
        [
            "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n",
            "ffconcat version 1.0\nfile {clip}\n",
            "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        ],
    )
    def test_a_list_of_other_files(self, tmp_path, clip, text):
        (tmp_path / "a.mp4").write_text(text.format(clip=clip))
        with pytest.raises(ImageError, match="is no video that can be read"):
            frames(tmp_path / "a.mp4", count=1)

    def test_an_address_or_a_protocol_is_a_file_that_is_not_there(self, clip):
        for path in ("http://127.0.0.1:9/a.mp4", f"concat:{clip}", f"subfile,,:{clip}"):
            with pytest.raises(ImageError, match="does not exist"):
                frames(path, count=1)

    def test_nothing_and_what_is_no_file(self, tmp_path):
        (tmp_path / "empty.mp4").touch()
        os.mkfifo(tmp_path / "pipe")
        for name, said in (("empty.mp4", "zero bytes"), ("pipe", "no regular"), ("", "directory")):
            with pytest.raises(ImageError, match=said):
                frames(tmp_path / name, count=1)
        with pytest.raises(ImageError, match="of type int, can't be read: give the path"):
            frames(7, count=1)
        for name in ("a" * 5000, "a\0b"):
            with pytest.raises(ImageError, match="can't be opened"):
                frames(tmp_path / name, count=1)

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
    def test_damaged_is_an_answer_or_a_sentence(self, tmp_path, name):
        data = write(tmp_path / name, times=range(10)).read_bytes()
        rng = np.random.default_rng(1)
        for _ in range(25):
            cut = bytearray(data[: rng.integers(1, len(data) + 1)])
            for place in rng.integers(0, len(cut), rng.integers(0, 20)):
                cut[place] = rng.integers(256)
            (tmp_path / name).write_bytes(cut)
            with suppress(ImageError):
                assert 1 <= len(list(frames(tmp_path / name, count=3))) <= 3

    def test_too_many_pixels_are_known_before_they_are_decoded(self, clip, monkeypatch):
        assert len(list(frames(clip, count=1, max_pixels=64 * 64))) == 1
        with pytest.raises(ImageError, match=r"is 64×64, .* over the limit"):
            frames(clip, count=1, max_pixels=64 * 64 - 1)

    def test_a_missing_package(self, clip, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(OptionError, match="needs av of the `video` extra"):
            frames(clip, count=1)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"count": 1, "fps": 1},
        {"count": 0},
        {"count": True},
        {"count": 1.5},
        {"fps": 0},
        {"fps": -1},
        {"fps": float("nan")},
        {"every_s": float("inf")},
        {"every_s": "1"},
    ],
)
def test_a_choice_that_is_none(clip, choice):
    with pytest.raises(OptionError, match=r"--(frames|fps|every).*: expected"):
        frames(clip, **choice)


def test_clocks():
    assert clocks([0, 3.9, 61, 3600]) == ["0:00", "0:03", "1:01", "1:00:00"]
    assert clocks([0.0, 0.3, 0.7]) == ["0:00.0", "0:00.3", "0:00.7"]
    assert clocks([1.25, 1.29]) == ["0:01.25", "0:01.29"]
    assert clocks([]) == []


def test_each_frame_stands_after_its_time():
    messages = video_messages([Frame(0.2, "a"), Frame(3.0, "b")], "What happens?", "Be brief.")
    assert messages[0] == {"role": "system", "content": "Be brief."}
    parts = [part.get("text") or f"<{part['image']}>" for part in messages[1]["content"]]
    assert "".join(parts) == "0:00\n<a>\n0:03\n<b>\nWhat happens?"
    with pytest.raises(PromptError, match="empty"):
        video_messages([], " ")
