"""`fastvlm generate`: the verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, BinaryIO

from fastvlm_mlx.cli.common import BundlePath, Json, option, print_json
from fastvlm_mlx.errors import ImageError

QUESTION, SAMPLING, IMAGE = "Question", "Sampling", "Image and encoder"
# As `vision.units` and `image.decode` have them, which take as long to import as all of the help.
COMPUTE_UNITS = ("auto", "all", "cpu", "gpu", "ne")
ENCODER_COMPUTES = ("auto", "float32", "bfloat16")
MAX_PIXELS = 178_956_970


def generate(
    bundle: BundlePath,
    image: Annotated[
        list[str],
        option(
            "The file of the image; - reads it from standard input. Several are all in one prompt.",
            group=QUESTION,
            value="FILE",
        ),
    ],
    prompt: Annotated[
        list[str], option("What to ask about the image.", group=QUESTION, value="TEXT")
    ],
    max_tokens: Annotated[
        int, option("End an answer after this many tokens.", group=SAMPLING, value="N")
    ] = 256,
    temperature: Annotated[
        float,
        option(
            "How freely tokens are drawn; 0 always takes the likeliest.", group=SAMPLING, value="T"
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        option(
            "Draw from the likeliest tokens that together have this probability.",
            group=SAMPLING,
            value="P",
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        option(
            "Draw from this many of the likeliest tokens; 0 draws from all.",
            group=SAMPLING,
            value="N",
        ),
    ] = 0,
    min_p: Annotated[
        float,
        option(
            "Leave out tokens that have less than this share of the likeliest's probability.",
            group=SAMPLING,
            value="P",
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        option("Above 1 it makes recent tokens less likely.", group=SAMPLING, value="X"),
    ] = None,
    seed: Annotated[
        int | None, option("Make sampled answers repeatable.", group=SAMPLING, value="N")
    ] = None,
    stop: Annotated[
        list[str] | None, option("End the answer before this text.", group=SAMPLING, value="TEXT")
    ] = None,
    json_schema: Annotated[
        Path | None,
        option(
            "Answer in JSON that meets the schema in this file. Needs [json].",
            group=SAMPLING,
            value="FILE",
        ),
    ] = None,
    compute_units: Annotated[
        str,
        option(
            "Where Core ML runs the encoder, on macOS only: ne is the Neural Engine, all leaves it "
            "to Core ML, and auto measures them and takes the fastest that is exact enough.",
            group=IMAGE,
            choices=COMPUTE_UNITS,
        ),
    ] = "auto",
    encoder_compute: Annotated[
        str,
        option(
            "What torch computes the encoder in, on Linux; auto is float32, and bfloat16 is faster "
            "and less exact.",
            group=IMAGE,
            choices=ENCODER_COMPUTES,
        ),
    ] = "auto",
    image_size: Annotated[
        int | None,
        option(
            "The input size in pixels, one of those that the bundle's encoder takes.",
            group=IMAGE,
            value="PIXELS",
            default="the bundle's own",
        ),
    ] = None,
    crop: Annotated[
        bool,
        option(
            "Crop the image to its centre, as Apple's demo app does, and do not pad it.",
            "--crop",
            group=IMAGE,
        ),
    ] = False,
    max_pixels: Annotated[
        int | None,
        option(
            "Refuse an image that has more pixels.",
            group=IMAGE,
            value="N",
            default=f"{MAX_PIXELS:,}",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The answer goes to standard output as it is made, and a line of timings to standard error.
    With several prompts the images are encoded once. FastVLM was trained with one image; of several
    each stands on a line before the prompt, in the order in which they are given."""
    from fastvlm_mlx.bundle.bundle import Bundle
    from fastvlm_mlx.bundle.manifest import MANIFEST
    from fastvlm_mlx.cli import show
    from fastvlm_mlx.image.decode import (
        DEFAULT_MAX_PIXELS,
        ImageSource,
        check_max_pixels,
        load_image,
    )
    from fastvlm_mlx.language.json_schema import read_schema
    from fastvlm_mlx.language.sampling import SamplingOptions
    from fastvlm_mlx.loading import load

    options = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        json_schema=None if json_schema is None else read_schema(json_schema),
    )
    limit = DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels
    check_max_pixels(limit)
    if image.count("-") > 1:
        raise ImageError("--image - is given twice, and standard input holds one image: give files")
    sources: list[ImageSource] = [_stdin() if each == "-" else each for each in image]
    if Bundle.open(bundle).manifest is None:
        show.note(
            f"warning: {bundle} has no {MANIFEST}, so its files can't be checked; only bundles of "
            "Apple and of mlx-vlm come without one"
        )
    decoded = [load_image(source, max_pixels=limit) for source in sources]
    if len(decoded) > 1:
        show.note(f"warning: {show.SEVERAL_IMAGES}")
    model = load(
        bundle,
        compute_units=compute_units,
        image_size=image_size,
        crop=crop,
        max_pixels=limit,
        encoder_compute=encoder_compute,
    )
    answers = []
    for generation in model.ask(decoded, prompt, options):
        for piece in generation:
            if not as_json:
                print(show.answer(piece), end="", flush=True)
        answers.append(generation.result)
        if not as_json:
            print(flush=True)
            print(show.timing_line(generation.result, model.encoder.backend), file=sys.stderr)
    if as_json:
        print_json(
            {
                "model": str(bundle),
                **({"image": image[0]} if len(image) == 1 else {"images": image}),
                "encoder": model.encoder.backend,
                "answers": [answer.to_dict() for answer in answers],
                "peak_memory_bytes": max(answer.peak_memory_bytes for answer in answers),
            }
        )


def _stdin() -> BinaryIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise ImageError(
            "--image - reads an image from standard input, which holds none: pipe one in"
        )
    return sys.stdin.buffer
