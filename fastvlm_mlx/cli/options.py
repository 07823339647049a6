"""Options that more than one verb declares: how to sample, and how an image is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.common import option

if TYPE_CHECKING:
    from fastvlm_mlx.language.sampling import SamplingOptions

SAMPLING, IMAGE = "Sampling", "Image and encoder"
# As the modules have them that use them, which take as long to import as all of the help.
COMPUTE_UNITS = ("auto", "all", "cpu", "gpu", "ne")
ENCODER_COMPUTES = ("auto", "float32", "bfloat16")
DETAILS = ("auto", "low", "high", "original")
MAX_PIXELS = 178_956_970

MaxTokens = Annotated[
    int, option("End an answer after this many tokens.", group=SAMPLING, value="N")
]
Temperature = Annotated[
    float,
    option("How freely tokens are drawn; 0 always takes the likeliest.", group=SAMPLING, value="T"),
]
TopP = Annotated[
    float,
    option(
        "Draw from the likeliest tokens that together have this probability.",
        group=SAMPLING,
        value="P",
    ),
]
TopK = Annotated[
    int,
    option(
        "Draw from this many of the likeliest tokens; 0 draws from all.",
        group=SAMPLING,
        value="N",
    ),
]
MinP = Annotated[
    float,
    option(
        "Leave out tokens that have less than this share of the likeliest's probability.",
        group=SAMPLING,
        value="P",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    option("Above 1 it makes recent tokens less likely.", group=SAMPLING, value="X"),
]
Seed = Annotated[int | None, option("Make sampled answers repeatable.", group=SAMPLING, value="N")]
Stop = Annotated[
    list[str] | None, option("End the answer before this text.", group=SAMPLING, value="TEXT")
]
JsonSchema = Annotated[
    Path | None,
    option(
        "Answer in JSON that meets the schema in this file. Needs [json].",
        group=SAMPLING,
        value="FILE",
    ),
]
ComputeUnits = Annotated[
    str,
    option(
        "Where Core ML runs the encoder, on macOS only: ne is the Neural Engine, all leaves it "
        "to Core ML, and auto measures them and takes the fastest that is exact enough.",
        group=IMAGE,
        choices=COMPUTE_UNITS,
    ),
]
EncoderCompute = Annotated[
    str,
    option(
        "What torch computes the encoder in, on Linux; auto is float32, and bfloat16 is faster "
        "and less exact.",
        group=IMAGE,
        choices=ENCODER_COMPUTES,
    ),
]
ImageSize = Annotated[
    int | None,
    option(
        "The input size in pixels, one of those that the bundle's encoder takes.",
        group=IMAGE,
        value="PIXELS",
        default="the bundle's own",
    ),
]
Detail = Annotated[
    str,
    option(
        "The size that each image is looked at in: low is the bundle's smallest and high its "
        "largest, such as 512 and 1024 of a bundle exported with --image-sizes 512,1024; auto is "
        "--image-size; original is an overview and 2×2 tiles, five times the tokens of auto.",
        group=IMAGE,
        choices=DETAILS,
    ),
]
Crop = Annotated[
    bool,
    option(
        "Crop the image to its centre, as Apple's demo app does, and do not pad it.",
        "--crop",
        group=IMAGE,
    ),
]
MaxPixels = Annotated[
    int | None,
    option(
        "Refuse an image that has more pixels.",
        group=IMAGE,
        value="N",
        default=f"{MAX_PIXELS:,}",
    ),
]


def pixel_limit(max_pixels: int | None) -> int:
    """Raises OptionError: no number of pixels."""
    from fastvlm_mlx.image.decode import DEFAULT_MAX_PIXELS, check_max_pixels

    return check_max_pixels(DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels)


def sampling(call: typer.Context) -> SamplingOptions:
    """How a verb was told to sample, by those of the options above that it declares.

    Raises:
        OptionError: a value that is none of its option's, or a schema that can't be read.
    """
    from dataclasses import fields

    from fastvlm_mlx.language.sampling import SamplingOptions
    from fastvlm_mlx.language.structured.json_schema import read_schema

    names = [each.name for each in fields(SamplingOptions)]
    given = {name: call.params[name] for name in names if name in call.params}
    given["stop"] = tuple(given.get("stop") or ())
    if given.get("json_schema") is not None:
        given["json_schema"] = read_schema(Path(given["json_schema"]))
    return SamplingOptions(**given)
