"""FastViTHD in MLX: the encoder of an `mlx` bundle, [1, S, S, 3] → [1, S/64, S/64, C] inside.

The bundle holds the source's parameters one by one. What stands linearly before or after a
convolution or a product is folded into it when the encoder is made: BatchNorm, layer scale, the
channel norm's affine part, the scale of attention. On a GPU, heads are padded to a width that MLX
has fused attention for, and the whole is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Literal

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
# What computes; "" is the CPU.
Backend = Literal["metal", "cuda", ""]

# Metal's fused attention takes these heads, for any number of places (mlx 0.32,
# mlx/backend/metal/scaled_dot_product_attention.cpp: has_fused_kernel; wider ones are slower than
# the written-out form there). CUDA's takes every multiple of 8 up to 128, but only in half
# precision (mlx/backend/cuda/scaled_dot_product_attention.cpp: supports_sdpa_cudnn), and MLX writes
# the rest out by itself.
_METAL_HEADS = (64, 72, 80, 96, 128)


class Weights:
    """Takes parameters by name, in float32, out of the dictionary.

    A matrix that was quantized, as mlx-vlm's own conversions do, is dequantized.
    """

    def __init__(self, arrays: dict[str, mx.array], quantization: Quantization | None):
        self._arrays = arrays
        self._quantization = quantization
        self._arrays.pop(UNUSED, None)

    def __call__(self, name: str, *shape: int) -> mx.array:
        """Raises EncoderError: it is missing, or of another shape."""
        stem = name.removesuffix("weight")
        array, scales, biases = (
            self._arrays.pop(part, None) for part in (name, stem + "scales", stem + "biases")
        )
        if array is None:
            raise EncoderError(
                f"the encoder lacks {name}: expected it for the vision_config of config.json, "
                "export the checkpoint again"
            )
        path = f"vision_tower.vision_model.{stem[:-1]}"
        stored = self._quantization.of(path) if self._quantization else None
        if stored is not None and scales is not None:
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
        if self._arrays:
            raise EncoderError(
                f"the encoder holds {min(self._arrays)}, which is no weight of the vision_config "
                "in config.json: export the checkpoint again"
            )


@dataclass(frozen=True)
class Conv:
    """A convolution with its bias, padded to keep the size at stride 1.

    Metal has a depthwise kernel for kernels of up to 7, strides of up to 2, and as many outputs as
    inputs, a multiple of 16 (mlx 0.32, mlx/backend/metal/conv.cpp: dispatch_conv_2D_gpu). All of
    FastViTHD's fit but those with two outputs a channel, between the stages and at the end. These
    are two of one output each, and the results lie behind each other: what comes next takes its
    weights in that order. CUDA leaves the choice to cuDNN (mlx/backend/cuda/conv.cpp).

    Attributes:
        weights: one [O, k, k, I / groups]; two where each channel has two outputs, even and odd;
            or a matrix [I, O].
        bias: in the order of the outputs; None where it was folded into what comes next.
    """

    weights: tuple[mx.array, ...]
    bias: mx.array | None
    stride: int = 1

    @classmethod
    def make(
        cls, weight: mx.array, bias: mx.array | None, stride: int = 1, groups: int = 1
    ) -> Conv:
        """Fold a 1×1 kernel into a matrix, split a depthwise one that doubles the channels."""
        rows, kernel, _, columns = weight.shape
        if kernel == 1 and groups == 1:
            return cls((weight.reshape(rows, columns).T,), bias)
        if _doubles(groups, rows):
            halves = None if bias is None else _evens_first(bias)
            return cls((weight[0::2], weight[1::2]), halves, stride)
        return cls((weight,), bias, stride)

    def after(self, inputs: int) -> Conv:
        """The same matrix behind a depthwise convolution of so many inputs."""
        (matrix,) = self.weights
        if not _doubles(inputs, matrix.shape[0]):
            return self
        return Conv((_evens_first(matrix),), self.bias, self.stride)

    def beside(self, inputs: int) -> Conv:
        """The same matrix, its outputs in a depthwise convolution's order of so many inputs."""
        (matrix,) = self.weights
        if not _doubles(inputs, matrix.shape[1]):
            return self
        bias = None if self.bias is None else _evens_first(self.bias)
        return Conv((_evens_first(matrix.T).T,), bias, self.stride)

    def cast(self, dtype: mx.Dtype) -> Conv:
        # A transposed view would be copied by every product.
        weights = tuple(mx.contiguous(weight.astype(dtype)) for weight in self.weights)
        bias = None if self.bias is None else self.bias.astype(dtype)
        # Evaluated here, so that what is folded is in memory for one layer at a time.
        mx.eval(weights, bias)
        return Conv(weights, bias, self.stride)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, I] → [B, H / stride, W / stride, O]."""
        if self.weights[0].ndim == 2:
            # Adds the bias before the result is rounded and written.
            matrix = self.weights[0]
            return x @ matrix if self.bias is None else mx.addmm(self.bias, x, matrix)
        kernel, columns = self.weights[0].shape[2:]
        parts = [
            mx.conv2d(x, w, self.stride, kernel // 2, groups=x.shape[-1] // columns)
            for w in self.weights
        ]
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts, -1)
        return y if self.bias is None else y + self.bias


def _doubles(inputs: int, outputs: int) -> bool:
    """Whether a depthwise convolution is split into two."""
    return inputs > 1 and outputs == 2 * inputs


def _evens_first(array: mx.array) -> mx.array:
    return mx.concatenate([array[0::2], array[1::2]])


def _in_order(x: mx.array) -> mx.array:
    """Undo it, in the last axis."""
    return mx.unflatten(x, -1, (2, -1)).swapaxes(-1, -2).flatten(-2)


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
        arrays: dict[str, mx.array],
        config: VisionConfig,
        quantization: Quantization | None = None,
        observe: Observe | None = None,
        dtype: mx.Dtype | None = None,
        device: Backend | None = None,
    ):
        """Fold and evaluate the weights.

        Args:
            arrays: under the names of an `mlx` bundle without `vision_tower.vision_model.`. It is
                emptied, so that no weight is in memory both folded and not.
            quantization: config.json's, for conversions that quantized the encoder too.
            observe: called with every operation's result; computes in float32 as on a CPU.
            dtype: what is computed in, where it is not as above.
            device: whose operations are used, where it is not the default device.

        Raises:
            EncoderError: a weight is missing, unknown or of the wrong shape.
        """
        self.image_size = config.image_size
        self.num_tokens = config.num_tokens
        self.hidden_size = config.hidden_size
        self._head_dim = config.head_dim
        self._op: Observe = observe or (lambda result: result)
        if device is None:
            device = "" if observe else default_backend()
        self._device = device
        self._pad = _padded(config.head_dim, device) - config.head_dim
        stem = arrays.get("patch_embed.blocks.0.reparam_conv.bias")
        own = mx.float32 if stem is None or not device else stem.dtype
        self._dtype = dtype or own
        weights = Weights(arrays, quantization)
        del stem
        # One layer at a time is in memory as it was stored.
        self._layers = [_cast(layer, self._dtype) for layer in _layers(weights, config)]
        self._conv_exp, *excite = (conv.cast(self._dtype) for conv in _conv_exp(weights, config))
        self._se = (excite[0], excite[1])
        weights.check_all_taken()
        mx.clear_cache()
        self._run = mx.compile(self.graph) if device else self.graph

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → float32 [1, N, C]."""
        expected = (1, 3, self.image_size, self.image_size)
        if images.shape != expected:
            raise EncoderError(
                f"the image has shape {list(images.shape)}, expected {list(expected)}"
            )
        x = mx.array(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
        return np.array(self._run(x.astype(self._dtype)).astype(mx.float32))

    def graph(self, x: mx.array) -> mx.array:
        """[B, S, S, 3] → [B, N, C], both in the type that is computed in."""
        for layer in self._layers:
            x = self._layer(layer, x)
        x = self._op(self._conv_exp(x))
        reduce, expand = self._se
        gate = self._op(_mean(x))
        gate = self._op(mx.sigmoid(self._op(expand(mx.maximum(self._op(reduce(gate)), 0)))))
        x = _gelu(self._op(x * gate), self._op).flatten(1, 2)
        if len(self._conv_exp.weights) == 2:
            x = _in_order(x)
        return x

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
        if not self._device:
            mx.eval(y)
        return y

    def _attention(self, layer: AttentionBlock, x: mx.array) -> mx.array:
        """[B, H, W, C] → the same, every position attending to every other."""
        batch, height, width, channels = x.shape
        tokens = (batch, height * width, 3, channels // self._head_dim, self._head_dim)
        normed = self._op(mx.fast.layer_norm(x, None, None, EPS))
        qkv = self._op(layer.qkv(normed)).reshape(tokens)
        # [B, N, 3, heads, width] → three of [B, heads, N, width], none of them copied.
        attend = self._fused if self._device else self._written_out
        mixed = attend(*(part.squeeze(2).swapaxes(1, 2) for part in mx.split(qkv, 3, 2)))
        mixed = self._op(mixed.swapaxes(1, 2).reshape(x.shape))
        return self._op(layer.proj(mixed))

    def _fused(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Attention of a GPU: scores and softmax are never written."""
        if self._pad:
            q, k, v = (mx.pad(part, [(0, 0)] * 3 + [(0, self._pad)]) for part in (q, k, v))
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)
        return mixed[..., : self._head_dim]

    def _written_out(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        # What is observed is what MLX falls back to where it has no fused kernel, as mlx-vlm does:
        # the scores, too, are rounded, and may overflow.
        scores = self._op(q @ k.swapaxes(-1, -2))
        return self._op(mx.softmax(scores, axis=-1, precise=True)) @ v


def default_backend() -> Backend:
    """What MLX computes on if nothing else is said."""
    if mx.default_device() == mx.Device(mx.cpu):
        return ""
    return "metal" if mx.metal.is_available() else "cuda"


def _padded(head_dim: int, device: Backend) -> int:
    """The width of heads that fused attention takes; as it is where none does."""
    if device != "metal":
        return head_dim
    return next((width for width in _METAL_HEADS if width >= head_dim), head_dim)


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


def _layers(weights: Weights, config: VisionConfig) -> Iterator[Layer]:
    """Everything before `conv_exp`, in order, folded, float32."""
    dims = config.embed_dims
    stem = "patch_embed.blocks.{}.reparam_conv"
    yield Activated(_conv(weights, stem.format(0), 3, dims[0], 3, 2))
    yield Activated(_conv(weights, stem.format(1), dims[0], dims[0], 3, 2, dims[0]))
    yield Activated(_conv(weights, stem.format(2), dims[0], dims[0]))
    index = 0
    for stage, dim in enumerate(dims):
        if stage:
            kernel, stride, narrow = config.down_patch_size, config.down_stride, dims[stage - 1]
            lkb = f"network.{index}.proj.0.lkb_reparam"
            yield Activated(_conv(weights, lkb, narrow, dim, kernel, stride, narrow))
            pointwise = _conv(weights, f"network.{index}.proj.1.reparam_conv", dim, dim)
            yield Activated(pointwise.after(narrow))
            index += 1
        position = config.pos_embs_shapes[stage]
        if position is not None:
            name = f"network.{index}.reparam_conv"
            yield _conv(weights, name, dim, dim, position, 1, dim)
            index += 1
        hidden = int(dim * config.mlp_ratios[stage])
        for number in range(config.layers[stage]):
            prefix = f"network.{index}.{number}"
            if config.token_mixers[stage] == "attention":
                yield _attention_block(weights, prefix, dim, hidden, config.head_dim)
            else:
                kernel = config.repmixer_kernel_size
                yield _repmixer_block(weights, prefix, dim, hidden, kernel)
        index += 1


def _conv_exp(weights: Weights, config: VisionConfig) -> Iterator[Conv]:
    """The convolution at the end, and the two products of its squeeze and excite."""
    narrow, wide = config.embed_dims[-1], config.hidden_size
    yield _conv(weights, "conv_exp.reparam_conv", narrow, wide, 3, 1, narrow)
    yield _conv(weights, "conv_exp.se.reduce", wide, wide // 16).after(narrow)
    yield _conv(weights, "conv_exp.se.expand", wide // 16, wide).beside(narrow)


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
    weights: Weights, prefix: str, dim: int, hidden: int, head_dim: int
) -> AttentionBlock:
    """The channel norm's affine part and the scale of attention into qkv, layer scale into proj."""
    norm, shift = weights(f"{prefix}.norm.weight", dim), weights(f"{prefix}.norm.bias", dim)
    qkv = weights(f"{prefix}.token_mixer.qkv.weight", 3 * dim, dim)
    qkv = mx.concatenate([qkv[:dim] * head_dim**-0.5, qkv[dim:]])
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
    """BatchNorm into the depthwise convolution before it, its shift on through the first product,
    layer scale into the last one."""
    gain, shift, mean, variance = (
        weights(f"{prefix}.conv.bn.{name}", dim)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    gain = gain * mx.rsqrt(variance + EPS)
    depthwise = weights(f"{prefix}.conv.conv.weight", dim, 7, 7, 1)
    up = weights(f"{prefix}.fc1.weight", hidden, 1, 1, dim)
    shifted = up.reshape(hidden, dim) @ (shift - mean * gain)
    down = weights(f"{prefix}.fc2.weight", dim, 1, 1, hidden)
    return (
        Conv.make(depthwise * gain[:, None, None, None], None, groups=dim),
        Conv.make(up, weights(f"{prefix}.fc1.bias", hidden) + shifted),
        Conv.make(down * scale[:, None, None, None], weights(f"{prefix}.fc2.bias", dim) * scale),
    )
