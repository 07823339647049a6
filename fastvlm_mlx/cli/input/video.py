"""What `fastvlm generate` does with --video: which frames, one prompt about all, or captions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.errors import OptionError

if TYPE_CHECKING:
    from fastvlm_mlx.fastvlm import FastVLM
    from fastvlm_mlx.image.live import Live
    from fastvlm_mlx.image.video import Frame, Frames
    from fastvlm_mlx.language.generate import Generation, GenerationResult
    from fastvlm_mlx.language.sampling import SamplingOptions

# Frames of one prompt where nothing is said of their number.
FRAMES = 8
# Frames in a second of a camera or a screen where nothing is said of it.
FPS = 1.0
# Captions that are decoded together: more would let the first ones wait.
_CAPTIONS = 4


def check(
    image: list[str] | None,
    video: str | None,
    frames: int | None,
    fps: float | None,
    every: float | None,
    prompt: list[str],
) -> None:
    """Raises OptionError: neither an image nor a video, or both; or what belongs to the other."""
    if not image and video is None:
        raise OptionError(
            "`fastvlm generate` needs --image or --video, which are not given: see `fastvlm "
            "generate --help`"
        )
    if image and video is not None:
        raise OptionError(
            "--image and --video are both given, and a prompt is about one of them: leave one out"
        )
    given = [n for n, v in (("frames", frames), ("fps", fps), ("every", every)) if v is not None]
    if given and video is None:
        raise OptionError(f"--{given[0]} is given without --video: give a video, or leave it out")
    if every is not None and len(prompt) > 1:
        raise OptionError(
            f"--every is given with {len(prompt)} prompts: expected one, which is asked about "
            "each frame"
        )


def choose(
    path: str, frames: int | None, fps: float | None, every: float | None, max_pixels: int
) -> Frames | Live:
    """Raises ImageError, OptionError: as `fastvlm_mlx.image.video.frames` and `live`."""
    from fastvlm_mlx.image import devices, live, video

    if devices.is_live(path):
        if fps is None and every is None:
            fps = FPS
        if frames is None and every is None:
            frames = FRAMES
        return live.live(path, every_s=every, fps=fps, count=frames, max_pixels=max_pixels)
    if frames is None and fps is None and every is None:
        frames = FRAMES
    return video.frames(path, count=frames, fps=fps, every_s=every, max_pixels=max_pixels)


def answers(
    loaded: FastVLM,
    chosen: Frames | Live,
    prompts: list[str],
    options: SamplingOptions,
    detail: str,
) -> Iterator[Generation]:
    """One prompt with all frames, once for each of the prompts; they are encoded once, each in the
    detail.

    Raises:
        PromptError: a prompt has no room, before a frame is decoded.
        ImageError: as the frames.
    """
    from fastvlm_mlx.cli import show
    from fastvlm_mlx.image.video import Frame, video_messages

    for prompt in prompts:
        empty = [Frame(time_s, None) for time_s in chosen.times_s]
        loaded.check(video_messages(empty, prompt, detail=detail), options)
    frames = list(chosen)
    if len(frames) > 1:
        show.note(f"warning: {show.SEVERAL_IMAGES}")
    for prompt in prompts:
        messages = video_messages(frames, prompt, detail=detail)
        generation, features = loaded.begin(messages, options)
        frames = [Frame(frame.time_s, each) for frame, each in zip(frames, features, strict=True)]
        yield generation


def captions(
    loaded: FastVLM, chosen: Frames | Live, prompt: str, options: SamplingOptions, detail: str
) -> Iterator[tuple[float, GenerationResult]]:
    """Each frame's time with what is answered about it, as it comes. Frames of a file are decoded
    and made ready beside the decode of the answers before them; of a device each is the newest when
    the answer before it has ended."""
    from fastvlm_mlx.image.live import Live

    if isinstance(chosen, Live):
        for frame in chosen:
            yield frame.time_s, loaded.generate(frame.image, prompt, options, detail=detail)
        return
    times: list[float] = []

    def images() -> Iterator[Any]:
        for frame in _ahead(iter(chosen)):
            times.append(frame.time_s)
            yield frame.image

    results = loaded.batch(images(), prompt, options, batch_size=_CAPTIONS, detail=detail)
    for number, result in enumerate(results):
        yield times[number], result


@contextmanager
def until_interrupted(chosen: Frames | Live) -> Iterator[None]:
    """Take Ctrl-C as the end of what has no end by itself: of a camera or a screen."""
    from fastvlm_mlx.image.live import Live

    try:
        yield
    except KeyboardInterrupt:
        if not isinstance(chosen, Live):
            raise


def print_captions(
    found: Iterator[tuple[float, GenerationResult]], chosen: Frames | Live, *, quiet: bool
) -> None:
    """A line "time<TAB>caption" each."""
    from fastvlm_mlx.cli import show
    from fastvlm_mlx.image.frame_times import clocks
    from fastvlm_mlx.image.live import Live

    # What a device will send has no times before.
    known = [] if isinstance(chosen, Live) else chosen.times_s
    written = dict(zip(known, clocks(known), strict=True))
    before: float | None = None
    for time_s, result in found:
        # A caption's own line ends and tabs would look like the next line.
        caption = " ".join(show.answer(result.text).split())
        clock = written.get(time_s) or clocks([*([] if before is None else [before]), time_s])[-1]
        before = time_s
        print(f"{clock}\t{caption}", flush=True)
        if not quiet:
            print(show.timing_line(result), file=sys.stderr)


def _ahead(frames: Iterator[Frame]) -> Iterator[Frame]:
    """The same frames, the next one decoded on another thread meanwhile."""
    with ThreadPoolExecutor(1, "fastvlm-video") as pool:
        coming = pool.submit(next, frames, None)
        while (frame := coming.result()) is not None:
            coming = pool.submit(next, frames, None)
            yield frame
