"""What an export is asked for: frozen groups, each checked by itself before anything is read."""

from model_export.options.destination import LAYOUTS, DestinationOptions
from model_export.options.encoder import (
    DEFAULT_ENCODER_BPW,
    PALETTE_BITS,
    PRECISIONS,
    TARGETS,
    EncoderOptions,
    parse_sizes,
)
from model_export.options.export import FLAT_NAMES, ExportOptions, FlatOptions
from model_export.options.limits import ENCODER_SNR_DB, GateLimits
from model_export.options.llm import (
    BITS,
    DEFAULT_FORMAT,
    DTYPES,
    FLOAT16_MAX,
    GROUP_SIZES,
    METHODS,
    RECIPES,
    LLMOptions,
)

__all__ = [
    "BITS",
    "DEFAULT_ENCODER_BPW",
    "DEFAULT_FORMAT",
    "DTYPES",
    "ENCODER_SNR_DB",
    "FLAT_NAMES",
    "FLOAT16_MAX",
    "GROUP_SIZES",
    "LAYOUTS",
    "METHODS",
    "PALETTE_BITS",
    "PRECISIONS",
    "RECIPES",
    "TARGETS",
    "DestinationOptions",
    "EncoderOptions",
    "ExportOptions",
    "FlatOptions",
    "GateLimits",
    "LLMOptions",
    "parse_sizes",
]
