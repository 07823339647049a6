"""`fastvlm plan`: how much memory a bundle will need on a device, and how fast it will be there.

Memory is counted from shapes: the exporter's own count of the weights, mlx-lm's cache, the largest
sum of live tensors. Time is a roofline (`roofline.py`). Both are of the running bundle: loading,
Core ML's compilation and the camera's images come on top, which is why a phone's limit counts as
safe only up to `SAFE_SHARE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.kind import is_bundle
from fastvlm_mlx.errors import OptionError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.options import BITS, ExportOptions
from model_export.planning import roofline
from model_export.planning.devices import CHIPS, DEVICES, Device, find_device
from model_export.planning.footprint import Footprint, of_bundle, of_checkpoint
from model_export.planning.roofline import Decoder

CONTEXT = 2048
KV_BITS = (4, 8)
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
# The demo app's limit of MLX's buffer cache (app/FastVLM App/FastVLMModel.swift).
MLX_CACHE_BYTES = 20 * 2**20
# An app on an iPhone 17 Pro before any model: memoryBaselineMB of apple-silicon-llm-bench's
# iphone17pro-mlx-qwen3-0.6b-4bit-short-chat-run2.jsonl.
APP_BYTES = 69_000_000
# The demo app with 0.5B in fp16 was killed for memory on an iPhone 13 mini with the entitlement and
# on an iPhone 16 Pro (apple/ml-fastvlm #8 and #24), where what is counted here is 0.62 and 0.49 of
# the limit.
SAFE_SHARE = 0.45

FITS, ENTITLED, TIGHT, TOO_LARGE, NO_LIMIT = (
    "fits",
    "fits with the entitlement",
    "tight",
    "too large",
    "no limit for one app",
)


@dataclass(frozen=True)
class Memory:
    """Bytes resident while the bundle answers, by part, as if none of them were given back."""

    language_model: int
    encoder: int
    kv_cache: int
    encoder_activations: int
    prefill_activations: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Forecast:
    """What a bundle of this footprint needs and does on a device.

    Seconds are None where a rate of the chip is not published. Tokens per second are given for a
    full context.
    """

    device: str
    memory: Memory
    verdict: str
    encoder_s: float | None
    project_s: float | None
    prefill_s: float | None
    tokens_per_s: float | None

    @property
    def ttft_s(self) -> float | None:
        parts = (self.encoder_s, self.project_s, self.prefill_s)
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def fits(self) -> bool:
        return self.verdict not in (TIGHT, TOO_LARGE)

    def to_dict(self) -> dict[str, Any]:
        device = DEVICES[self.device]
        limit = device.limit
        return {
            "device": self.device,
            "chip": device.chip,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "limit_bytes": None if limit is None else limit.plain,
            "limit_with_entitlement_bytes": None if limit is None else limit.entitled,
            "limit_at_least": limit is not None and limit.at_least,
            "verdict": self.verdict,
            "fits": self.fits,
            "encoder_s": self.encoder_s,
            "project_s": self.project_s,
            "prefill_s": self.prefill_s,
            "ttft_s": self.ttft_s,
            "tokens_per_s": self.tokens_per_s,
        }


def run(
    path: str | Path,
    device: str | None,
    options: ExportOptions | None,
    *,
    base: str | None = None,
    revision: str | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
) -> list[dict[str, Any]]:
    """Make the forecasts for `device`, or for each of `DEVICES`, as `plan --json` prints them.

    Args:
        path: a bundle's directory, or a checkpoint of any kind; what a hub id names is downloaded,
            and an export finds it in the cache.
        options: of the export; a bundle takes none.
        context: tokens in the KV cache; `CONTEXT`, or all that the model has, if it is not given.

    Raises:
        BundleError, CheckpointError, ConfigError, EncoderError: it is not whole.
        OptionError: an unknown device, or options that don't fit.
    """
    names = list(DEVICES) if device is None else [find_device(device)]
    found_here = Path(path).expanduser()
    export = None
    if found_here.is_dir() and is_bundle(found_here):
        if options or base or revision:
            raise OptionError(
                f"{path} is a bundle, whose bits and sizes are fixed: leave out the options of "
                "export, or name the checkpoint"
            )
        footprint = of_bundle(found_here)
    else:
        options = options or ExportOptions()
        checkpoint = Checkpoint(
            path, base=base, revision=revision, image_size=options.encoder.default_size
        )
        footprint = of_checkpoint(checkpoint, options)
        export = exporter(checkpoint, options)
    if context is None:
        context = min(CONTEXT, footprint.config.text.max_position_embeddings)
    plans = []
    for name in names:
        found = forecast(footprint, name, context, kv_bits)
        changes = [] if found.fits else remedies(footprint, name, context, kv_bits, export)
        facts = {"prompt_tokens": footprint.prompt_tokens, "context": context, "kv_bits": kv_bits}
        plans.append({**found.to_dict(), **facts, "remedies": changes})
    return plans


def lm_buffers(decoder: Decoder, tokens: int, size: int) -> int:
    """Count the bytes that are resident beside weights and cache.

    These are the app, MLX's buffer cache, and the live tensors of a layer's MLP in prefill (the
    residual, gate, up and their product).
    """
    return prefill_activations(decoder, tokens, size) + MLX_CACHE_BYTES + APP_BYTES


def prefill_activations(decoder: Decoder, tokens: int, size: int) -> int:
    return tokens * (decoder.hidden + 3 * decoder.intermediate) * size


def memory(footprint: Footprint, context: int, kv_bits: int | None) -> Memory:
    """Count the resident bytes of each part with `context` tokens in the cache."""
    size = SIZES[footprint.dtype]
    live = roofline.encoder_live_elements(footprint.config.vision)
    return Memory(
        language_model=footprint.llm_bytes,
        encoder=footprint.encoder_bytes,
        kv_cache=roofline.kv_cache_bytes(footprint.decoder, context, size, kv_bits),
        encoder_activations=live * (4 if footprint.encoder_format == "fp32" else 2),
        prefill_activations=prefill_activations(footprint.decoder, footprint.prompt_tokens, size),
        buffers=MLX_CACHE_BYTES + APP_BYTES,
    )


def forecast(footprint: Footprint, device: str, context: int, kv_bits: int | None) -> Forecast:
    """Forecast memory and speed of a footprint on one of `DEVICES`.

    Raises:
        OptionError: the context does not hold the image and a question, or is beyond the model.
    """
    check_context(footprint, context, kv_bits)
    chip, decoder = CHIPS[DEVICES[device].chip], footprint.decoder
    parts = memory(footprint, context, kv_bits)
    vision = footprint.config.vision
    projector = decoder.hidden * (vision.hidden_size + decoder.hidden)
    token_s = roofline.decode_seconds(chip, decoder, footprint.read_bytes + parts.kv_cache)
    return Forecast(
        device=device,
        memory=parts,
        verdict=_verdict(parts.total, DEVICES[device]),
        encoder_s=roofline.encoder_seconds(
            chip, roofline.encoder_macs(vision).total, neural_engine=footprint.neural_engine
        ),
        project_s=roofline.gpu_seconds(chip, 2 * vision.num_tokens * projector),
        prefill_s=roofline.prefill_seconds(chip, decoder, footprint.prompt_tokens),
        tokens_per_s=None if token_s is None else 1 / token_s,
    )


def check_context(footprint: Footprint, context: int, kv_bits: int | None) -> None:
    longest = footprint.config.text.max_position_embeddings
    if not footprint.prompt_tokens < context <= longest:
        raise OptionError(
            f"--context is {context:,}: expected more than an image and a question, "
            f"{footprint.prompt_tokens:,} tokens, and at most the model's {longest:,}"
        )
    if kv_bits is not None and kv_bits not in KV_BITS:
        raise OptionError(f"--kv-bits is {kv_bits}: expected 4 or 8, or leave it out")
    if kv_bits is not None and footprint.decoder.head_dim % roofline.KV_GROUP:
        raise OptionError(
            f"--kv-bits quantizes groups of {roofline.KV_GROUP} and the model's heads are "
            f"{footprint.decoder.head_dim} wide: leave it out"
        )


def remedies(
    footprint: Footprint,
    device: str,
    context: int,
    kv_bits: int | None,
    export: Callable[[int], Footprint | None] | None,
) -> list[str]:
    """Find the changes that make it fit: the smallest of each kind, else the smallest pair.

    The list is empty if nothing helps.

    Args:
        export: gives the footprint at other bits of the LLM (`exporter`); None for a bundle.
    """

    def fits(candidate: Footprint, tokens: int, bits: int | None) -> bool:
        return forecast(candidate, device, tokens, bits).fits

    made = [(bits, export(bits)) for bits in sorted(BITS, reverse=True)] if export else []
    smaller = [(n, other) for n, other in made if other and other.llm_bytes < footprint.llm_bytes]
    shorter = [n for n in (4096, 2048, 1024, 512) if footprint.prompt_tokens < n < context]
    quantizable = kv_bits is None and footprint.decoder.head_dim % roofline.KV_GROUP == 0
    found = [
        next((f"--llm-bits {n}" for n, other in smaller if fits(other, context, kv_bits)), None),
        next((f"--context {n}" for n in shorter if fits(footprint, n, kv_bits)), None),
        next(
            (f"--kv-bits {n}" for n in (8, 4) if quantizable and fits(footprint, context, n)), None
        ),
    ]
    pairs = (
        f"--llm-bits {n} --context {tokens}"
        for tokens in shorter
        for n, other in smaller
        if fits(other, tokens, kv_bits)
    )
    return [change for change in found if change] or list(islice(pairs, 1))


def exporter(checkpoint: Checkpoint, options: ExportOptions) -> Callable[[int], Footprint | None]:
    """Return a function that gives the footprint of `checkpoint` at other bits of the LLM.

    It gives None where the other options don't go with those bits.
    """

    def export(bits: int) -> Footprint | None:
        try:
            return of_checkpoint(
                checkpoint, replace(options, llm=replace(options.llm, bits=bits, bpw=None))
            )
        except OptionError:
            return None

    return export


def _verdict(total: int, device: Device) -> str:
    limit = device.limit
    if limit is None:
        return NO_LIMIT
    if total <= SAFE_SHARE * limit.plain:
        return FITS
    if total <= SAFE_SHARE * limit.entitled:
        return ENTITLED
    return TIGHT if total <= limit.entitled else TOO_LARGE
