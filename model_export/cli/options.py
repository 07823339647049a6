"""The options that several of the exporter's verbs have, each with its text in one place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from fastvlm_mlx.bundle.quantization import MODES
from fastvlm_mlx.cli.common import OUTPUT, argument, option
from model_export.options import (
    BITS,
    DEFAULT_ENCODER_BPW,
    DEFAULT_FORMAT,
    DTYPES,
    GROUP_SIZES,
    LAYOUTS,
    METHODS,
    PRECISIONS,
    RECIPES,
    TARGETS,
    ExportOptions,
    parse_sizes,
)
from model_export.presets import PRESETS

BUNDLE, LANGUAGE, ENCODER = "Bundle", "Language model", "Encoder"
SOURCE, LIMITS, QUESTIONS = "Checkpoint", "Limits of the gates", "Questions"
OWN_LIMIT = "the gate's own"
_DEFAULTS = ExportOptions().flat()

Out = Annotated[Path, argument("OUT", "The directory in which the bundle appears.")]
CheckpointReference = Annotated[
    str, argument("CHECKPOINT", "The directory of a checkpoint or of an adapter, or a hub id.")
]

Base = Annotated[
    str | None,
    option(
        "The base checkpoint of an adapter or a projector, if not the one that it names.",
        group=SOURCE,
        value="CHECKPOINT",
    ),
]
Revision = Annotated[
    str | None,
    option("The branch, tag or commit of a hub id.", group=SOURCE, value="NAME"),
]

Preset = Annotated[
    str | None,
    option(
        "Start from a named set of options; any other option replaces what the set says.",
        group=BUNDLE,
        choices=PRESETS,
    ),
]
Layout = Annotated[
    str | None,
    option(
        "Who loads the bundle: app is Apple's demo app (a Core ML encoder), mlx is mlx-vlm and "
        "mlx-swift-lm.",
        group=BUNDLE,
        choices=LAYOUTS,
        default=_DEFAULTS["layout"],
    ),
]
Overwrite = Annotated[
    bool, option("Replace the bundle that is at OUT.", "--overwrite", group=BUNDLE)
]

LlmBits = Annotated[
    int | None,
    option(
        "How many bits store a weight; 16 does not quantize, and 5 needs layout mlx.",
        group=LANGUAGE,
        choices=BITS,
        default=_DEFAULTS["llm_bits"],
    ),
]
GroupSize = Annotated[
    int | None,
    option(
        "How many weights share a scale.",
        group=LANGUAGE,
        choices=GROUP_SIZES,
        default=DEFAULT_FORMAT.group_size,
    ),
]
LlmMode = Annotated[
    str | None,
    option(
        "The format of quantized weights; all but affine have bits and a group size of their own, "
        "and need layout mlx.",
        group=LANGUAGE,
        choices=MODES,
        default=_DEFAULTS["llm_mode"],
    ),
]
EmbedBits = Annotated[
    int | None,
    option(
        "The bits of the embedding, if they are not --llm-bits.",
        group=LANGUAGE,
        choices=BITS,
    ),
]
HeadBits = Annotated[
    int | None,
    option(
        "The bits of the output head, if they are not --llm-bits; for models whose head is not the "
        "embedding.",
        group=LANGUAGE,
        choices=BITS,
    ),
]
ProjectorBits = Annotated[
    int | None,
    option(
        "The bits of the projector; 16 does not quantize.",
        group=LANGUAGE,
        choices=BITS,
        default=_DEFAULTS["projector_bits"],
    ),
]
Recipe = Annotated[
    str | None,
    option(
        "Give each layer its own bits: as a JSON file says, where --llm-bits holds for the layers "
        "that it does not name, or as a recipe of mlx-lm says, which takes no --llm-bits. More "
        "than one choice of bits needs layout mlx.",
        group=LANGUAGE,
        choices=RECIPES,
        value="FILE",
    ),
]
LlmBpw = Annotated[
    float | None,
    option(
        "Find the bits of each matrix that lose least, at this many bits per weight on average.",
        group=LANGUAGE,
        value="BITS",
    ),
]
Method = Annotated[
    str | None,
    option(
        "How weights are rounded: rtn takes the nearest value; the others look at a calibration "
        "set to lose less.",
        group=LANGUAGE,
        choices=METHODS,
        default=_DEFAULTS["method"],
    ),
]
CalibrationSet = Annotated[
    str | None,
    option(
        "The calibration set for --method, --llm-bpw and a mixed encoder: a directory of images, "
        "or a JSONL file of image, prompt and answer.",
        group=LANGUAGE,
        value="PATH",
        default="generated images and a photograph",
    ),
]
Dtype = Annotated[
    str | None,
    option(
        "The type of the weights that are not quantized.",
        group=LANGUAGE,
        choices=DTYPES,
        default=_DEFAULTS["dtype"],
    ),
]

EncoderPrecision = Annotated[
    str | None,
    option(
        "How a Core ML encoder stores its weights; mixed chooses for each of them.",
        group=ENCODER,
        choices=PRECISIONS,
        default=_DEFAULTS["encoder_precision"],
    ),
]
EncoderBpw = Annotated[
    float | None,
    option(
        "The bits per weight of a mixed encoder, 4 or more.",
        group=ENCODER,
        value="BITS",
        default=f"{DEFAULT_ENCODER_BPW:g}",
    ),
]
DeploymentTarget = Annotated[
    str | None,
    option(
        "The first iOS that loads a Core ML encoder.",
        group=ENCODER,
        choices=TARGETS,
        default="the first possible",
    ),
]
ImageSize = Annotated[
    int | None,
    option(
        "The encoder's input size in pixels, a multiple of 64.",
        group=ENCODER,
        value="PIXELS",
        default="the checkpoint's own",
    ),
]
ImageSizes = Annotated[
    str | None,
    option(
        "Several input sizes in one encoder, such as 512,1024; they share its weights.",
        group=ENCODER,
        value="PIXELS,PIXELS",
    ),
]
ImageInput = Annotated[
    bool,
    option(
        "Make a Core ML encoder that takes 8-bit images (ImageType) in place of arrays.",
        "--image-input",
        group=ENCODER,
    ),
]

MinSnr = Annotated[
    float | None,
    option(
        "The lowest signal-to-noise ratio of the encoder that passes, in dB.",
        group=LIMITS,
        value="DB",
        default=OWN_LIMIT,
    ),
]
MaxKl = Annotated[
    float | None,
    option(
        "The highest KL divergence of the answers that passes, in nats.",
        group=LIMITS,
        value="NATS",
        default=OWN_LIMIT,
    ),
]
MinAgreement = Annotated[
    float | None,
    option(
        "The lowest share of equal tokens that passes, from 0 to 1.",
        group=LIMITS,
        value="SHARE",
        default=OWN_LIMIT,
    ),
]

Questions = Annotated[
    str | None,
    option(
        "Ask about these: a directory of images, or a JSONL file of image, prompt and answer.",
        group=QUESTIONS,
        value="PATH",
        default="generated scenes",
    ),
]
Count = Annotated[
    int,
    option(
        "Ask at least this many questions, if they are about generated scenes.",
        group=QUESTIONS,
        value="N",
    ),
]
Plot = Annotated[
    Path | None,
    option("Draw size against loss into a .png, .svg or .pdf file.", group=OUTPUT, value="FILE"),
]


def fields(params: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """The fields of `ExportOptions` that a command line gives.

    Args:
        params: all parameters of the verb; None and False are what was not given.
        own: those that are no field.

    Raises:
        OptionError: there is no such preset, or --image-sizes can't be read.
    """
    given = {
        name: value
        for name, value in params.items()
        if name not in own and value is not None and value is not False
    }
    if "image_sizes" in given:
        given["image_sizes"] = parse_sizes(given["image_sizes"])
    return given


def export_options(params: Mapping[str, Any], own: Collection[str]) -> ExportOptions:
    """The options of an export, from what a command line gives.

    Raises:
        OptionError: as `fields`, or they don't go together.
    """
    return ExportOptions.of(**fields(params, own))
