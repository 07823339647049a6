"""What will run: a bundle as it lies there, or what a checkpoint becomes by the options, in bytes
and shapes, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.config import FastVLMConfig, VisionConfig
from fastvlm_mlx.vision.package import describe
from model_export import llm, recipes
from model_export.checkpoint import Checkpoint
from model_export.options import ExportOptions
from model_export.roofline import Decoder
from model_export.weights import (
    MLX_ENCODER_PREFIX,
    bundle_specs,
    encoder_specs,
    in_encoder,
    is_unused,
)

# System prompt, chat template and a question of two lines, in tokens.
PROMPT_TEXT_TOKENS = 40
# What goes into the products beside it. BatchNorm's bias stays, as that of the convolution.
FOLDED = (
    *(".bn.weight", ".bn.running_mean", ".bn.running_var", ".norm.weight", ".norm.bias"),
    *(".layer_scale", ".layer_scale_1", ".layer_scale_2"),
)


@dataclass(frozen=True)
class Subject:
    """What will run: a bundle, or what a checkpoint becomes by the options.

    Attributes:
        llm_bytes: of the language model and the projector, as stored.
        read_bytes: of the weights that each token reads.
        encoder_format: what the encoder computes in; fp32 is beyond the Neural Engine.
    """

    name: str
    kind: str
    layout: str
    config: FastVLMConfig
    decoder: Decoder
    dtype: str
    llm_bytes: int
    read_bytes: int
    encoder_bytes: int
    encoder_format: str

    @property
    def prompt_tokens(self) -> int:
        return self.config.vision.num_tokens + PROMPT_TEXT_TOKENS

    @property
    def neural_engine(self) -> bool:
        return self.layout == "app" and self.encoder_format != "fp32"


def of_bundle(path: Path) -> Subject:
    """A bundle as it lies there, from its headers.

    Raises:
        BundleError, ConfigError, EncoderError: it is not whole.
    """
    bundle = Bundle.open(path)
    tensors = bundle.tensors()
    sizes = {name: array.nbytes for name, array in tensors.items()}
    encoder = sum(size for name, size in sizes.items() if name.startswith(MLX_ENCODER_PREFIX))
    llm_sizes = {n: s for n, s in sizes.items() if not n.startswith(MLX_ENCODER_PREFIX)}
    tied = not any(".lm_head." in name for name in llm_sizes)
    precision = {"float32": "fp32", "bfloat16": "bf16"}.get(bundle.config.dtype, "fp16")
    if bundle.layout == "app":
        info = describe(bundle.package)
        encoder, precision = info.bytes, info.precision
    return Subject(
        name=path.resolve().name,
        kind="bundle",
        layout=bundle.layout,
        config=bundle.config,
        decoder=Decoder.of(bundle.config.text, tied=tied),
        dtype=bundle.config.dtype,
        llm_bytes=sum(llm_sizes.values()),
        read_bytes=sum(size for name, size in llm_sizes.items() if _is_read(name, tied=tied)),
        encoder_bytes=encoder,
        encoder_format=precision,
    )


def of_checkpoint(checkpoint: Checkpoint, options: ExportOptions) -> Subject:
    """What `checkpoint` becomes by `options`, in the exporter's own count, but for the rows that
    the export adds to a full vocabulary.

    Raises:
        OptionError: the options don't fit it.
    """
    specs = checkpoint.llm_specs
    chosen = recipes.scheme(specs, checkpoint.config, options)
    stored = {
        entry.name: entry.bytes
        for spec in specs
        for entry in llm.stored(spec, chosen, options.dtype)
    }
    total = sum(stored.values())
    read = sum(size for name, size in stored.items() if _is_read(name, tied=checkpoint.tied))
    if options.llm_bpw is not None:
        # The search fills what it is given, and what each token reads shrinks with the rest.
        target = int(options.llm_bpw * checkpoint.llm_parameters / 8)
        total, read = target, read * target // total
    return Subject(
        name=checkpoint.name,
        kind="checkpoint",
        layout=options.layout,
        config=checkpoint.config,
        decoder=Decoder.of(checkpoint.config.text, tied=checkpoint.tied),
        dtype=options.dtype,
        llm_bytes=total,
        read_bytes=read,
        encoder_bytes=encoder_bytes(checkpoint, options),
        encoder_format=options.encoder_format,
    )


def encoder_bytes(checkpoint: Checkpoint, options: ExportOptions) -> int:
    """Bytes of the encoder's weights: of the folded module in a package, of what an `mlx` bundle
    stores."""
    if options.layout == "mlx":
        specs = bundle_specs(checkpoint.config, tied=checkpoint.tied, layout="mlx")
        encoder = [spec for spec in specs if in_encoder(spec)]
        stored = (entry for spec in encoder for entry in llm.stored(spec, {}, options.dtype))
        return sum(entry.bytes for entry in stored)
    return int(_folded_parameters(checkpoint.config.vision) * options.encoder_bits / 8)


@cache
def _folded_parameters(vision: VisionConfig) -> int:
    """What `fastvithd.fold` leaves of the encoder's parameters, counted without torch."""
    shapes = {spec.name: spec.shape for spec in encoder_specs(vision) if not is_unused(spec.name)}
    kept = sum(prod(shape) for name, shape in shapes.items() if not name.endswith(FOLDED))
    # Attention's first product gets a bias, from the norm before it.
    return kept + sum(shape[0] for name, shape in shapes.items() if name.endswith("qkv.weight"))


def _is_read(name: str, *, tied: bool) -> bool:
    """Whether each token reads all of it: the projector is read once, of an embedding that is
    not the head one row."""
    if "projector" in name:
        return False
    return tied or "embed_tokens" not in name
