"""Count FastVLM's operations and bytes from its shapes, and predict the seconds that they take.

The prediction is a roofline with one factor for each stage. The time of encoder and prefill is
their operations divided by a share of the chip's peak rate. The time of decoding is the bytes that
it reads divided by a share of the bandwidth. Each layer adds the time to launch it.
`benchmarks/plan.py` fits the shares to published measurements, and prints how far off each
measurement is predicted if those of its own chip are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from fastvlm_mlx.bundle.config import TextConfig, VisionConfig
from model_export.planning.devices import GB, Chip

TERA = 10**12


@dataclass(frozen=True)
class Efficiency:
    """Which share of a chip's rates each stage reaches, and what it takes besides.

    Attributes:
        bandwidth: the share of the memory's bandwidth that decoding reaches.
        layer_s: the seconds that launching a layer takes, whatever its size.
        gpu: the share of the GPU's fp32 peak that prefill reaches.
        accelerated: the same on a GPU whose cores have Neural Accelerators. They are faster than
            the fp32 peak, so it may be above 1.
        neural_engine: the share of the Neural Engine's fp16 peak that the encoder reaches.
        call_s: the seconds that calling the Neural Engine takes.
    """

    bandwidth: float
    layer_s: float
    gpu: float
    accelerated: float
    neural_engine: float
    call_s: float


# These are the results of `python -m benchmarks.plan`; a test repeats the fit.
FITTED = Efficiency(0.794, 31.3e-6, 0.397, 1.122, 0.378, 0.408e-3)


@dataclass(frozen=True)
class Decoder:
    """The shapes of a language model with the architecture of Llama and Qwen2."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, text: TextConfig, *, tied: bool) -> Decoder:
        return cls(
            text.hidden_size,
            text.num_hidden_layers,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
            text.intermediate_size,
            text.vocab_size,
            tied,
        )

    @property
    def layer_weights(self) -> int:
        """The number of weights in the matrices of all layers: q, k, v, o, gate, up and down."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def read_weights(self) -> int:
        """The number of weights that one token reads: those of the layers and of the head."""
        return self.layer_weights + self.vocab * self.hidden

    def prefill_flops(self, tokens: int) -> float:
        """Count the operations of a prompt: two for each weight and token, those of attention, in
        which a token looks at all before it (2·2·heads·head_dim·tokens²/2), and the head's for the
        last token."""
        products = 2 * self.layer_weights * tokens
        attention = 2 * self.layers * self.heads * self.head_dim * tokens**2
        return products + attention + 2 * self.vocab * self.hidden

    def kv_elements(self, tokens: int) -> int:
        """Count the numbers that the KV cache holds for `tokens` tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens


@dataclass(frozen=True)
class Macs:
    """How many multiply-accumulates FastViTHD takes for one image, by kind."""

    dense: int
    depthwise: int
    attention: int

    @property
    def total(self) -> int:
        return self.dense + self.depthwise + self.attention

    def __add__(self, other: Macs) -> Macs:
        return Macs(
            self.dense + other.dense,
            self.depthwise + other.depthwise,
            self.attention + other.attention,
        )


@dataclass(frozen=True)
class _Part:
    """A block of FastViTHD.

    Attributes:
        macs: its multiply-accumulates.
        times: how often it occurs.
        live: the elements of the tensors that are alive at its widest point, if no operation works
            in place or is fused with another.
    """

    macs: Macs
    times: int
    live: int


def encoder_macs(vision: VisionConfig) -> Macs:
    """Count all of FastViTHD at `vision.image_size` but the classification head."""
    total = Macs(0, 0, 0)
    for part in _parts(vision):
        for _ in range(part.times):
            total += part.macs
    return total


def encoder_live_elements(vision: VisionConfig) -> int:
    """Count the elements of the tensors that are alive at once, at the widest point of the folded
    network (`encoder/fastvithd.py`), if it runs one operation at a time. Core ML may fuse and tile
    operations, and use less."""
    return max(part.live for part in _parts(vision))


def _parts(vision: VisionConfig) -> Iterator[_Part]:
    size, dims = vision.image_size, vision.embed_dims
    half, side = (size // 2) ** 2, size // 4
    area = side**2
    # Stem: 3×3 dense, 3×3 depthwise, both strided, and 1×1; GELU needs its input and its output.
    stem = dims[0] * half
    yield _Part(Macs(27 * stem, 0, 0), 1, stem + max(3 * size**2, stem))
    yield _Part(Macs(0, 9 * dims[0] * area, 0), 1, dims[0] * (half + area))
    yield _Part(Macs(dims[0] ** 2 * area, 0, 0), 1, 2 * dims[0] * area)
    for stage, dim in enumerate(dims):
        if stage:
            before, wide = dims[stage - 1], area
            side //= vision.down_stride
            area = side**2
            large = vision.down_patch_size**2 * dim * area
            yield _Part(Macs(0, large, 0), 1, before * wide + dim * area)
            yield _Part(Macs(dim**2 * area, 0, 0), 1, 2 * dim * area)
        position = vision.pos_embs_shapes[stage]
        if position is not None:
            yield _Part(Macs(0, position**2 * dim * area, 0), 1, 2 * dim * area)
        hidden = int(dim * vision.mlp_ratios[stage])
        ffn = Macs(2 * dim * hidden * area, 49 * dim * area, 0)
        # The residual, and GELU's input and output between the two products.
        ffn_live = dim * area + 2 * hidden * area
        if vision.token_mixers[stage] == "attention":
            heads = dim // vision.head_dim
            mixer = Macs(4 * dim**2 * area, 0, 2 * dim * area**2)
            # The residual, q, k and v, and softmax's input and output.
            mixer_live = 4 * dim * area + max(2 * heads * area**2, dim * area)
        else:
            mixer = Macs(0, vision.repmixer_kernel_size**2 * dim * area, 0)
            mixer_live = 2 * dim * area
        yield _Part(ffn + mixer, vision.layers[stage], max(ffn_live, mixer_live))
    channels = vision.hidden_size
    squeeze = 2 * channels * (channels // 16)
    yield _Part(Macs(squeeze, 9 * channels * area, 0), 1, 2 * channels * area)


def encoder_seconds(
    chip: Chip, macs: int, *, neural_engine: bool, fit: Efficiency = FITTED
) -> float | None:
    """Predict the encoder's time. On the Neural Engine it is two operations for each
    multiply-accumulate, over the share of the fp16 peak, and a call. The GPU runs an encoder in
    fp32 or in MLX; no published figure checks that prediction."""
    if neural_engine:
        return fit.call_s + 2 * macs / (fit.neural_engine * chip.ne_tflops * TERA)
    return gpu_seconds(chip, 2 * macs, fit=fit)


def gpu_seconds(
    chip: Chip, flops: float, *, cores: int | None = None, fit: Efficiency = FITTED
) -> float | None:
    """Divide operations by what the GPU reaches of its peak; None where that is not published.

    Args:
        cores: how many cores the GPU has, if that is not as many as `chip` says.
    """
    if chip.gpu_tflops is None:
        return None
    share = fit.accelerated if chip.accelerators else fit.gpu
    return flops / (share * chip.gpu_tflops * (cores or chip.gpu_cores) / chip.gpu_cores * TERA)


def prefill_seconds(
    chip: Chip,
    decoder: Decoder,
    tokens: int,
    *,
    cores: int | None = None,
    fit: Efficiency = FITTED,
) -> float | None:
    """Predict the time of a prompt: its operations on the GPU, and the launch of every layer."""
    seconds = gpu_seconds(chip, decoder.prefill_flops(tokens), cores=cores, fit=fit)
    return None if seconds is None else seconds + fit.layer_s * decoder.layers


def decode_seconds(
    chip: Chip, decoder: Decoder, read_bytes: float, *, fit: Efficiency = FITTED
) -> float | None:
    """Predict the time of one token: `read_bytes` of weights and KV cache over the share of the
    bandwidth, and the launch of every layer."""
    if chip.bandwidth is None:
        return None
    return read_bytes / (fit.bandwidth * chip.bandwidth * GB) + fit.layer_s * decoder.layers


def kv_cache_bytes(decoder: Decoder, tokens: int, size: int, bits: int | None = None) -> int:
    """Count the bytes of mlx-lm's cache that holds `tokens` tokens; it grows in steps of 256.

    Args:
        size: the bytes of an element that is not quantized.
        bits: the bits of an element of a quantized cache, which has a scale and a bias for each 64
            elements; None for a cache that is not quantized.
    """
    steps = ceil(tokens / KV_STEP) * KV_STEP
    elements = decoder.kv_elements(steps)
    if bits is None:
        return elements * size
    return elements * bits // 8 + 2 * elements // KV_GROUP * size


# mlx_lm.models.cache: KVCache.step and QuantizedKVCache's defaults.
KV_STEP = 256
KV_GROUP = 64
