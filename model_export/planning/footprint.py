"""The footprint of a bundle, made or yet to be exported: bytes and shapes, from headers only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import FastVLMConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.vision.package import describe
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.names import MLX_ENCODER_PREFIX, bundle_specs, in_encoder
from model_export.checkpoint.tokenizer import export_tokenizer, extended
from model_export.encoder.package_size import package_bytes
from model_export.language import llm, recipes
from model_export.options import ExportOptions
from model_export.planning.roofline import Decoder

# System prompt, chat template and a question of two lines, in tokens.
PROMPT_TEXT_TOKENS = 40


@dataclass(frozen=True)
class Footprint:
    """How large a bundle is, and what a forecast needs to know of its shapes.

    Attributes:
        llm_bytes: size of the language model and the projector, as stored.
        read_bytes: size of the weights that each token reads.
        encoder_format: what the encoder computes in; the Neural Engine can't compute in fp32.
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


def of_bundle(path: Path) -> Footprint:
    """Measure a bundle that exists, from its headers.

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
    return Footprint(
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


def of_checkpoint(checkpoint: Checkpoint, options: ExportOptions) -> Footprint:
    """Foretell the footprint of an export, by the exporter's own count.

    A search for bits is counted as the largest size that it may take.

    Raises:
        OptionError: the options don't fit it.
    """
    checkpoint = _with_rows(checkpoint)
    specs = checkpoint.llm_specs
    chosen = recipes.scheme(specs, checkpoint.config, options.llm, options.destination.layout)
    stored = {
        entry.name: entry.bytes
        for spec in specs
        for entry in llm.stored(spec, chosen, options.llm.dtype)
    }
    total = sum(stored.values())
    read = sum(size for name, size in stored.items() if _is_read(name, tied=checkpoint.tied))
    if options.llm.bpw is not None:
        # It solves for the bits with scipy, which a plain forecast does without.
        from model_export.quantization.bits.candidates import Space

        space = Space(specs, checkpoint.config, options)
        space.check(options.llm.bpw)
        target = min(int(options.llm.bpw * checkpoint.llm_parameters / 8), space.largest)
        # What each token reads shrinks with the rest.
        total, read = target, read * target // total
    return Footprint(
        name=checkpoint.name,
        kind="checkpoint",
        layout=options.destination.layout,
        config=checkpoint.config,
        decoder=Decoder.of(checkpoint.config.text, tied=checkpoint.tied),
        dtype=options.llm.dtype,
        llm_bytes=total,
        read_bytes=read,
        encoder_bytes=encoder_bytes(checkpoint, options),
        encoder_format=options.encoder_format,
    )


def encoder_bytes(checkpoint: Checkpoint, options: ExportOptions) -> int:
    """Count the bytes of the encoder's package, or of its weights in an `mlx` bundle."""
    if options.destination.layout == "mlx":
        specs = bundle_specs(checkpoint.config, tied=checkpoint.tied, layout="mlx")
        encoder = [spec for spec in specs if in_encoder(spec)]
        stored = (entry for spec in encoder for entry in llm.stored(spec, {}, options.llm.dtype))
        return sum(entry.bytes for entry in stored)
    return package_bytes(checkpoint.config.vision, options.encoder)


def _with_rows(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the rows that an export adds to a vocabulary that has no room for
    `<image>`."""
    try:
        made = export_tokenizer(checkpoint)
        return extended(checkpoint, made.tokenizer, made.image_token_id + 1)
    except CheckpointError:
        # Without a tokenizer there is no export, and still a forecast.
        return checkpoint


def _is_read(name: str, *, tied: bool) -> bool:
    """Whether each token reads all of it: the projector is read once, of an embedding that is
    not the head one row."""
    if "projector" in name:
        return False
    return tied or "embed_tokens" not in name
