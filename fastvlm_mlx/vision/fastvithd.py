"""FastViTHD in MLX: the encoder of an `mlx` bundle, [1, S, S, 3] → [1, S/64, S/64, C] inside.

The bundle holds the source's parameters one by one; what follows a convolution or a product
linearly is folded into it when the encoder is made: BatchNorm, layer scale, the channel norm's
affine part (into qkv). Depthwise convolutions with two outputs a channel are two with one each,
which Metal has a kernel for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import sqrt

import mlx.core as mx
import numpy as np

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.bundle.quantization import Quantization
from fastvlm_mlx.errors import EncoderError

# Both of the source's norms (mci.py: LayerNormChannel, nn.BatchNorm2d).
EPS = 1e-5
# The classification head, which loaders of the layout want and FastVLM does not compute.
UNUSED = "head.proj"

# Applied to the result of every operation; the gate rounds and measures with it.
Observe = Callable[[mx.array], mx.array]


class Weights:
    """Takes parameters by name, in float32, and knows which were not taken.

    A matrix that was quantized, as mlx-vlm's own conversions do, is dequantized.
    """

    def __init__(self, arrays: Mapping[str, mx.array], quantization: Quantization | None):
        self._arrays = arrays
        self._quantization = quantization
        self._left = set(arrays) - {UNUSED}

    def __call__(self, name: str, *shape: int) -> mx.array:
        """Raises EncoderError: it is missing, or of another shape."""
        stem = name.removesuffix("weight")
        parts = [name, stem + "scales", stem + "biases"]
        self._left -= set(parts)
        if name not in self._arrays:
            raise EncoderError(
                f"the encoder lacks {name}: expected it for the vision_config of config.json, "
                "export the checkpoint again"
            )
        array = self._arrays[name]
        path = f"vision_tower.vision_model.{stem[:-1]}"
        stored = self._quantization.of(path) if self._quantization else None
        if stored is not None and parts[1] in self._arrays:
            scales, biases = self._arrays[parts[1]], self._arrays.get(parts[2])
            try:
                array = mx.dequantize(array, scales, biases, **asdict(stored))
            except ValueError as error:
                raise EncoderError(
                    f"the encoder's {name} is not quantized to {stored} as config.json says "
                    f"({error}): export the checkpoint again"
                ) from error
        if array.shape != shape:
            raise EncoderError(
                f"the encoder's {name} has shape {list(array.shape)} where vision_config implies "
                f"{list(shape)}: export the checkpoint again"
            )
        return array.astype(mx.float32)

    def check_all_taken(self) -> None:
        """Raises EncoderError: naming a parameter that is none of FastViTHD's."""
        if self._left:
            raise EncoderError(
                f"the encoder holds {min(self._left)}, which is no weight of the vision_config in "
                "config.json: export the checkpoint again"
            )


@dataclass(frozen=True)
class Conv:
    """A convolution with its bias, padded to keep the size at stride 1.

    Attributes:
        weights: one [O, k, k, I / groups]; two where each channel has two outputs, even and odd;
            or a matrix [I, O].
    """

    weights: tuple[mx.array, ...]
    bias: mx.array
    stride: int = 1

    @classmethod
    def make(cls, weight: mx.array, bias: mx.array, stride: int = 1, groups: int = 1) -> Conv:
        """Fold a 1×1 kernel into a matrix, split a depthwise one that doubles the channels."""
        rows, kernel, _, columns = weight.shape
        if kernel == 1 and groups == 1:
            return cls((weight.reshape(rows, columns).T,), bias)
        if groups > 1 and rows == 2 * groups:
            return cls((weight[0::2], weight[1::2]), bias, stride)
        return cls((weight,), bias, stride)

    def cast(self, dtype: mx.Dtype) -> Conv:
        # A transposed view would be copied by every product.
        weights = tuple(mx.contiguous(weight.astype(dtype)) for weight in self.weights)
        bias = self.bias.astype(dtype)
        # Evaluated here, so that what is folded is in memory for one layer at a time.
        mx.eval(weights, bias)
        return Conv(weights, bias, self.stride)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, I] → [B, H / stride, W / stride, O]."""
        if self.weights[0].ndim == 2:
            return x @ self.weights[0] + self.bias
        kernel, columns = self.weights[0].shape[2:]
        parts = [
            mx.conv2d(x, w, self.stride, kernel // 2, groups=x.shape[-1] // columns)
            for w in self.weights
        ]
        y = parts[0] if len(parts) == 1 else mx.stack(parts, -1).flatten(-2)
        return y + self.bias


@dataclass(frozen=True)
class RepMixerBlock:
    mixer: Conv
    ffn: tuple[Conv, Conv, Conv]


@dataclass(frozen=True)
class AttentionBlock:
    qkv: Conv
    proj: Conv
    ffn: tuple[Conv, Conv, Conv]


@dataclass(frozen=True)
class Activated:
    """A convolution followed by GELU."""

    conv: Conv


Layer = Conv | Activated | RepMixerBlock | AttentionBlock


class FastViTHD:
    """A `VisionEncoder` in MLX: float32 [1, 3, S, S] → float32 [1, N, C].

    On a GPU it computes in the weights' own type and is compiled as a whole; on a CPU, where MLX's
    half-precision kernels are an order of magnitude slower, in float32.
    """

    backend = "MLX"

    def __init__(
        self,
        arrays: Mapping[str, mx.array],
        config: VisionConfig,
        quantization: Quantization | None = None,
        observe: Observe | None = None,
        dtype: mx.Dtype | None = None,
    ):
        """Fold and evaluate the weights.

        Args:
            arrays: under the names of an `mlx` bundle without `vision_tower.vision_model.`.
            quantization: config.json's, for conversions that quantized the encoder too.
            observe: called with every operation's result; computes in float32, uncompiled.
            dtype: what is computed in, where it is not as above.

        Raises:
            EncoderError: a weight is missing, unknown or of the wrong shape.
        """
        self.image_size = config.image_size
        self.num_tokens = config.num_tokens
        self.hidden_size = config.hidden_size
        self._head_dim = config.head_dim
        self._op: Observe = observe or (lambda result: result)
        weights = Weights(arrays, quantization)
        stem = "patch_embed.blocks.0.reparam_conv.bias"
        on_gpu = mx.default_device() != mx.Device(mx.cpu) and observe is None
        own = arrays[stem].dtype if on_gpu and stem in arrays else mx.float32
        self._dtype = dtype or own
        self._layers = [_cast(layer, self._dtype) for layer in _layers(weights, config)]
        widths = (config.embed_dims[-1], config.hidden_size)
        self._conv_exp = _conv(weights, "conv_exp.reparam_conv", *widths, 3, 1, widths[0]).cast(
            self._dtype
        )
        squeezed = widths[1] // 16
        self._se = (
            _conv(weights, "conv_exp.se.reduce", widths[1], squeezed).cast(self._dtype),
            _conv(weights, "conv_exp.se.expand", squeezed, widths[1]).cast(self._dtype),
        )
        weights.check_all_taken()
        self._compiled = on_gpu
        self._run = mx.compile(self._forward) if on_gpu else self._forward

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → float32 [1, N, C]."""
        expected = (1, 3, self.image_size, self.image_size)
        if images.shape != expected:
            raise EncoderError(
                f"the image has shape {list(images.shape)}, expected {list(expected)}"
            )
        x = mx.array(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
        return np.array(self._run(x.astype(self._dtype)).astype(mx.float32))

    def _forward(self, x: mx.array) -> mx.array:
        for layer in self._layers:
            x = self._layer(layer, x)
        x = self._op(self._conv_exp(x))
        reduce, expand = self._se
        gate = self._op(_mean(x))
        gate = self._op(mx.sigmoid(self._op(expand(mx.maximum(self._op(reduce(gate)), 0)))))
        x = _gelu(self._op(x * gate), self._op)
        return x.flatten(1, 2)

    def _layer(self, layer: Layer, x: mx.array) -> mx.array:
        op = self._op
        if isinstance(layer, Conv):
            return op(layer(x))
        if isinstance(layer, Activated):
            return _gelu(op(layer.conv(x)), op)
        if isinstance(layer, RepMixerBlock):
            x = op(layer.mixer(x))
        else:
            x = op(x + self._attention(layer, x))
        depthwise, up, down = layer.ffn
        y = _gelu(op(up(op(depthwise(x)))), op)
        y = op(x + op(down(y)))
        # One block's activations at a time: a lazy graph of the whole would hold the memory of
        # more. Inside a compiled function there is nothing to evaluate.
        if not self._compiled:
            mx.eval(y)
        return y

    def _attention(self, layer: AttentionBlock, x: mx.array) -> mx.array:
        """[B, H, W, C] → the same, every position attending to every other."""
        batch, height, width, channels = x.shape
        tokens = (batch, height * width, 3, channels // self._head_dim, self._head_dim)
        normed = self._op(mx.fast.layer_norm(x, None, None, EPS))
        q, k, v = self._op(layer.qkv(normed)).reshape(tokens).transpose(2, 0, 3, 1, 4)
        # Metal has no fused kernel for heads this narrow. Written out, what is observed is what
        # MLX falls back to: the scores, too, are rounded, and may overflow.
        scores = self._op(self._op(q * self._head_dim**-0.5) @ k.swapaxes(-1, -2))
        mixed = self._op(mx.softmax(scores, axis=-1, precise=True)) @ v
        mixed = self._op(mixed).transpose(0, 2, 1, 3).reshape(x.shape)
        return self._op(layer.proj(mixed))


def _mean(x: mx.array) -> mx.array:
    """[B, H, W, C] → [B, 1, 1, C] in x's type.

    The sum is float32: in half precision that of 256 places of 256 is infinite already.
    """
    return x.astype(mx.float32).mean((1, 2), keepdims=True).astype(x.dtype)


def _gelu(x: mx.array, op: Observe) -> mx.array:
    """Exact GELU. Halved first: x · (1 + erf) overflows from half of the range on."""
    # nn.gelu is compiled on its own, which on a CPU calls the system's C++ compiler.
    return op(op(0.5 * x) * op(1 + op(mx.erf(op(x * sqrt(0.5))))))


def _cast(layer: Layer, dtype: mx.Dtype) -> Layer:
    cast: Layer
    if isinstance(layer, Conv):
        cast = layer.cast(dtype)
    elif isinstance(layer, Activated):
        cast = Activated(layer.conv.cast(dtype))
    elif isinstance(layer, RepMixerBlock):
        cast = RepMixerBlock(layer.mixer.cast(dtype), _cast_ffn(layer.ffn, dtype))
    else:
        cast = AttentionBlock(
            layer.qkv.cast(dtype), layer.proj.cast(dtype), _cast_ffn(layer.ffn, dtype)
        )
    return cast


def _cast_ffn(ffn: tuple[Conv, Conv, Conv], dtype: mx.Dtype) -> tuple[Conv, Conv, Conv]:
    first, second, third = (conv.cast(dtype) for conv in ffn)
    return first, second, third


def _layers(weights: Weights, config: VisionConfig) -> list[Layer]:
    """Everything before `conv_exp`, in order, folded, float32."""
    dims = config.embed_dims
    stem = "patch_embed.blocks.{}.reparam_conv"
    layers: list[Layer] = [
        Activated(_conv(weights, stem.format(0), 3, dims[0], 3, 2)),
        Activated(_conv(weights, stem.format(1), dims[0], dims[0], 3, 2, dims[0])),
        Activated(_conv(weights, stem.format(2), dims[0], dims[0])),
    ]
    index = 0
    for stage, dim in enumerate(dims):
        if stage:
            kernel, stride, narrow = config.down_patch_size, config.down_stride, dims[stage - 1]
            lkb = f"network.{index}.proj.0.lkb_reparam"
            layers.append(Activated(_conv(weights, lkb, narrow, dim, kernel, stride, narrow)))
            layers.append(
                Activated(_conv(weights, f"network.{index}.proj.1.reparam_conv", dim, dim))
            )
            index += 1
        position = config.pos_embs_shapes[stage]
        if position is not None:
            name = f"network.{index}.reparam_conv"
            layers.append(_conv(weights, name, dim, dim, position, 1, dim))
            index += 1
        hidden = int(dim * config.mlp_ratios[stage])
        block = _attention_block if config.token_mixers[stage] == "attention" else _repmixer_block
        for number in range(config.layers[stage]):
            prefix = f"network.{index}.{number}"
            layers.append(block(weights, prefix, dim, hidden, config.repmixer_kernel_size))
        index += 1
    return layers


def _conv(
    weights: Weights,
    name: str,
    channels: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> Conv:
    weight = weights(f"{name}.weight", outputs, kernel, kernel, channels // groups)
    return Conv.make(weight, weights(f"{name}.bias", outputs), stride, groups)


def _repmixer_block(
    weights: Weights, prefix: str, dim: int, hidden: int, kernel: int
) -> RepMixerBlock:
    scale = weights(f"{prefix}.layer_scale", 1, 1, dim).flatten()
    mixer = _conv(weights, f"{prefix}.token_mixer.reparam_conv", dim, dim, kernel, 1, dim)
    return RepMixerBlock(mixer, _ffn(weights, f"{prefix}.convffn", dim, hidden, scale))


def _attention_block(
    weights: Weights, prefix: str, dim: int, hidden: int, kernel: int
) -> AttentionBlock:
    norm, shift = weights(f"{prefix}.norm.weight", dim), weights(f"{prefix}.norm.bias", dim)
    qkv = weights(f"{prefix}.token_mixer.qkv.weight", 3 * dim, dim)
    proj = weights(f"{prefix}.token_mixer.proj.weight", dim, dim)
    bias = weights(f"{prefix}.token_mixer.proj.bias", dim)
    scales = [weights(f"{prefix}.layer_scale_{i}", 1, 1, dim).flatten() for i in (1, 2)]
    return AttentionBlock(
        Conv(((qkv * norm).T,), qkv @ shift),
        Conv(((proj * scales[0][:, None]).T,), bias * scales[0]),
        _ffn(weights, f"{prefix}.convffn", dim, hidden, scales[1]),
    )


def _ffn(
    weights: Weights, prefix: str, dim: int, hidden: int, scale: mx.array
) -> tuple[Conv, Conv, Conv]:
    """BatchNorm into the depthwise convolution before it, layer scale into the last product."""
    gain, shift, mean, variance = (
        weights(f"{prefix}.conv.bn.{name}", dim)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    gain = gain * mx.rsqrt(variance + EPS)
    depthwise = weights(f"{prefix}.conv.conv.weight", dim, 7, 7, 1)
    down = weights(f"{prefix}.fc2.weight", dim, 1, 1, hidden)
    return (
        Conv.make(depthwise * gain[:, None, None, None], shift - mean * gain, groups=dim),
        _conv(weights, f"{prefix}.fc1", dim, hidden),
        Conv.make(down * scale[:, None, None, None], weights(f"{prefix}.fc2.bias", dim) * scale),
    )
