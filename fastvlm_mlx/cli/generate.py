"""`fastvlm generate`: the verb."""

from __future__ import annotations

import sys
from typing import Annotated, BinaryIO

import typer

from fastvlm_mlx.cli.common import OUTPUT, Json, Model, option, print_json, resolve
from fastvlm_mlx.cli.input import video
from fastvlm_mlx.cli.options import (
    ComputeUnits,
    Crop,
    Detail,
    EncoderCompute,
    ImageSize,
    JsonSchema,
    MaxPixels,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    pixel_limit,
    sampling,
)
from fastvlm_mlx.errors import ImageError

QUESTION = "Question"


def generate(
    call: typer.Context,
    model: Model,
    prompt: Annotated[
        list[str], option("What to ask about the image or the video.", group=QUESTION, value="TEXT")
    ],
    image: Annotated[
        list[str] | None,
        option(
            "The file of the image; - reads it from standard input. Several are all in one prompt.",
            group=QUESTION,
            value="FILE",
        ),
    ] = None,
    video_path: Annotated[
        str | None,
        option(
            "The file of a video, in place of --image, or camera or screen: the frames, each with "
            "its time, are all in one prompt. camera:1 is the second one. Needs [video].",
            "--video",
            group=QUESTION,
            value="FILE|camera|screen",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        option(
            "How many frames of the video, at even distances; of a camera or screen so many one "
            "after the other, also with --fps or --every.",
            group=QUESTION,
            value="N",
            default=str(video.FRAMES),
        ),
    ] = None,
    fps: Annotated[
        float | None,
        option("Frames of each second, in place of --frames.", group=QUESTION, value="X"),
    ] = None,
    every: Annotated[
        float | None,
        option(
            "Ask about one frame in so many seconds by itself, and print a line for each. Of a "
            "camera or screen it is the newest one, until Ctrl-C ends it.",
            group=QUESTION,
            value="SECONDS",
        ),
    ] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    compute_units: ComputeUnits = "auto",
    encoder_compute: EncoderCompute = "auto",
    image_size: ImageSize = None,
    detail: Detail = "auto",
    crop: Crop = False,
    max_pixels: MaxPixels = None,
    quiet: Annotated[bool, option("Write no lines of timings.", "--quiet", group=OUTPUT)] = False,
    as_json: Json = False,
) -> None:
    """The answer goes to standard output as it is made, and a line of timings to standard error.
    With several prompts the images are encoded once. FastVLM was trained with one image; of several
    each stands on a line before the prompt, in the order in which they are given, and each frame of
    a video after a line with its time."""
    video.check(image, video_path, frames, fps, every, prompt)
    from fastvlm_mlx.bundle.bundle import Bundle
    from fastvlm_mlx.bundle.manifest import MANIFEST
    from fastvlm_mlx.cli import show
    from fastvlm_mlx.image.decode import ImageSource, load_image
    from fastvlm_mlx.loading import load
    from fastvlm_mlx.sizes import ORIGINAL, check_detail

    options = sampling(call)
    check_detail(detail)
    limit = pixel_limit(max_pixels)
    images = image or []
    if images.count("-") > 1:
        raise ImageError("--image - is given twice, and standard input holds one image: give files")
    sources: list[ImageSource] = [_stdin() if each == "-" else each for each in images]
    # Before an export, which takes minutes.
    chosen = video.choose(video_path, frames, fps, every, limit) if video_path is not None else None
    decoded = [load_image(source, max_pixels=limit) for source in sources]
    bundle = resolve(call, model)
    if Bundle.open(bundle).manifest is None:
        show.note(
            f"warning: {bundle} has no {MANIFEST}, so its files can't be checked; only bundles of "
            "Apple and of mlx-vlm come without one"
        )
    if len(decoded) > 1:
        show.note(f"warning: {show.SEVERAL_IMAGES}")
    if detail == ORIGINAL:
        show.note(f"warning: {show.TILES}")
    loaded = load(
        bundle,
        compute_units=compute_units,
        image_size=image_size,
        crop=crop,
        max_pixels=limit,
        encoder_compute=encoder_compute,
    )
    if chosen is not None and every is not None:
        captions = video.captions(loaded, chosen, prompt[0], options, detail)
        told = []
        with video.until_interrupted(chosen):
            if not as_json:
                video.print_captions(captions, chosen, quiet=quiet)
            else:
                for time_s, result in captions:
                    told.append({"time_s": time_s, **result.to_dict()})
        if as_json:
            print_json({"model": model, "images": [], "video": video_path, "captions": told})
        return
    if chosen is None:
        generations = loaded.ask(decoded, prompt, options, detail=detail)
    else:
        generations = video.answers(loaded, chosen, prompt, options, detail)
    backend = loaded.encoder_for(detail).backend
    answers = []
    for generation in generations:
        for piece in generation:
            if not as_json:
                print(show.answer(piece), end="", flush=True)
        answers.append(generation.result)
        if not as_json:
            print(flush=True)
            if not quiet:
                print(show.timing_line(generation.result, backend), file=sys.stderr)
    if as_json:
        print_json(
            {
                "model": model,
                "images": images,
                "video": video_path,
                "times_s": [] if chosen is None else chosen.times_s,
                "encoder": backend,
                # A video's prompt has the times of its frames in it.
                "answers": [
                    {**answer.to_dict(), "prompt": asked}
                    for asked, answer in zip(prompt, answers, strict=True)
                ],
                "peak_memory_bytes": max(answer.peak_memory_bytes for answer in answers),
            }
        )


def _stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise ImageError(
            "--image - reads an image from standard input, which holds none: pipe one in"
        )
    return sys.stdin.buffer
