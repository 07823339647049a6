"""`fastvlm generate --video`: frames in one prompt, or a line for each."""

import json
import signal
import subprocess
import sys
import time
from fractions import Fraction
from functools import partial

import av
import pytest

import fastvlm_mlx
from fastvlm_mlx.cli import show
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.image import live, video
from fastvlm_mlx.image.devices import Device
from fastvlm_mlx.image.video import Frame, frames, video_messages
from model_export.samples import scenes

PROMPT = "Describe the image."


@pytest.fixture
def generate(fastvlm, demo_bundle):
    return partial(fastvlm, "generate", demo_bundle)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Four scenes, a second each."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for number in range(16):
            scene = scenes.generate(12 + number // 4, held_out=True).draw(128)
            frame = av.VideoFrame.from_image(scene)
            frame.pts, frame.time_base = number, Fraction(1, 4)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def camera(monkeypatch, tmp_path):
    """Let every device stand for one that shows a scene, twenty times in a second."""
    path = tmp_path / "scene.png"
    scenes.generate(12, held_out=True).draw(128).save(path)
    source = f"movie='{path}':loop=0,setpts=N/20/TB,realtime"
    monkeypatch.setattr(live, "find", lambda name: Device("lavfi", source))
    return path


def test_all_frames_are_in_one_prompt_with_their_times(generate, clip, demo_bundle):
    words = ["--video", clip, "--frames", 2, "--prompt", PROMPT, "--prompt", "How many?"]
    status, out, err = generate(*words, "--json")
    told = json.loads(out)
    assert (status, told["video"], told["times_s"]) == (0, str(clip), [1.0, 3.0])
    assert "was trained with one image" in err
    first, second = told["answers"]
    assert (first["prompt"], second["prompt"]) == (PROMPT, "How many?")
    assert (first["image_tokens"], first["cached_tokens"]) == (32, 0)
    assert first["timings"]["encode_s"] > 0
    assert second["cached_tokens"] > 32
    assert second["timings"]["encode_s"] == 0

    model = fastvlm_mlx.load(demo_bundle)
    taken = list(frames(clip, count=2))
    content = [
        {"type": "text", "text": "0:01\n"},
        {"type": "image", "image": taken[0].image},
        {"type": "text", "text": "\n0:03\n"},
        {"type": "image", "image": taken[1].image},
        {"type": "text", "text": f"\n{PROMPT}"},
    ]
    expected = model.chat([{"role": "user", "content": content}]).result
    assert (first["text"], first["prompt_tokens"]) == (expected.text, expected.prompt_tokens)


def test_every_frame_becomes_a_line(generate, clip, demo_bundle):
    words = ["--every", 1, "--prompt", PROMPT, "--quiet"]
    status, out, err = generate("--video", clip, *words)
    assert err == ""
    model = fastvlm_mlx.load(demo_bundle)
    lines = [
        f"0:0{frame.time_s:.0f}\t{model.generate(frame.image, PROMPT).text}"
        for frame in frames(clip, every_s=1)
    ]
    assert (status, out.splitlines()) == (0, lines)
    assert len(set(lines)) == 4
    words = ["--every", 2, "--prompt", PROMPT, "--max-tokens", 2, "--json"]
    told = json.loads(generate("--video", clip, *words)[1])
    assert (told["video"], told["images"]) == (str(clip), [])
    assert [each["time_s"] for each in told["captions"]] == [0.0, 2.0]


def test_frames_that_have_no_room_are_told_before_one_is_decoded(
    generate, clip, demo_bundle, monkeypatch
):
    model = fastvlm_mlx.load(demo_bundle)
    fitting = model.config.text.max_position_embeddings // model.num_tokens
    many = [Frame(float(n), None) for n in range(fitting + 1)]
    with pytest.raises(PromptError, match="give fewer images"):
        model.check(video_messages(many, PROMPT))

    def decoded(self):
        raise AssertionError("a frame was decoded")

    monkeypatch.setattr(video.Frames, "__iter__", decoded)
    monkeypatch.setattr(video.Frames, "times_s", [frame.time_s for frame in many])
    status, out, err = generate("--video", clip, "--fps", 4, "--prompt", PROMPT)
    assert (status, out) == (2, "")
    assert "give fewer images" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "a.png"], "--image and --video are both given"),
        (["--frames", "2", "--fps", "1"], "--frames and --fps are given together"),
        (["--frames", "0"], "--frames is 0: expected a whole number"),
        (["--fps", "nan"], "--fps is nan: expected a number"),
        (["--every", "1", "--prompt", "So?"], "--every is given with 2 prompts"),
    ],
)
def test_a_mistake_is_a_sentence(generate, clip, words, said):
    status, out, err = generate("--video", clip, "--prompt", PROMPT, *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {said}")


def test_what_belongs_to_a_video_without_one(generate):
    status, _, err = generate("--image", "a.png", "--prompt", PROMPT, "--every", "1")
    assert (status, "--every is given without --video" in err) == (2, True)


def test_a_blank_prompt_is_no_question_though_times_stand_before_it(generate, clip):
    status, _, err = generate("--video", clip, "--prompt", " ")
    assert (status, "the prompt is empty" in err) == (2, True)


def test_a_missing_package_is_a_sentence(generate, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    status, _, err = generate("--video", clip, "--prompt", PROMPT)
    assert (status, "av of the `video` extra, which is not installed: run pip" in err) == (2, True)


def test_captions_of_a_camera(generate, camera, demo_bundle):
    words = ["--video", "camera", "--every", 0.1, "--frames", 3, "--prompt", PROMPT, "--quiet"]
    status, out, err = generate(*words)
    times, captions = zip(*(line.split("\t") for line in out.splitlines()), strict=True)
    assert (status, err, len(times), times[0]) == (0, "", 3, "0:00")
    assert len(set(times)) == 3
    assert set(captions) == {fastvlm_mlx.load(demo_bundle).generate(camera, PROMPT).text}


def test_ctrl_c_is_the_end_of_a_camera(generate, camera, monkeypatch):
    shown = []

    def interrupted(text):
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(show, "answer", interrupted)
    words = ["--video", "camera", "--every", 0.1, "--prompt", PROMPT, "--quiet"]
    status, out, err = generate(*words)
    assert (status, len(out.splitlines()), err) == (0, 2, "")


def test_frames_of_a_screen_in_one_prompt(generate, camera):
    words = ["--video", "screen", "--frames", 2, "--fps", 5, "--prompt", PROMPT, "--json"]
    status, out, _ = generate(*words)
    told = json.loads(out)
    assert (status, told["video"], told["times_s"][0]) == (0, "screen", 0)
    assert told["times_s"][1] >= 0.2
    assert told["answers"][0]["image_tokens"] == 32
    status, out, _ = generate(*words, "--every", 1)
    assert (status, out) == (2, "")


@pytest.mark.linux
def test_a_camera_that_is_not_there_is_a_sentence(generate):
    status, out, err = generate("--video", "camera:987", "--prompt", PROMPT)
    assert (status, out) == (2, "")
    assert err.startswith("error: there is no camera:987 here: ")


LIVE = """
from fastvlm_mlx.image import devices, live
live.find = lambda name: devices.Device("lavfi", "testsrc,realtime")
from fastvlm_mlx.__main__ import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_signal_ends_a_camera(demo_bundle, form):
    words = ["generate", demo_bundle, "--video", "camera", "--every", "0.1", "--max-tokens", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, *words, "--prompt", PROMPT, *form],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if form:
        # Nothing is printed before the end.
        time.sleep(30)
    else:
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert not form or json.loads(out)["captions"]
