"""FastViTHD's weights as its computation in MLX takes them: folded, and split where that helps.

What stands linearly before or after a convolution or a product is folded into it: BatchNorm, layer
scale, the channel norm's affine part, the scale of attention. The bundle holds the source's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import mlx.core as mx

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.bundle.quantization import Quantization
from fastvlm_mlx.errors import EncoderError

# Both of the source's norms (mci.py: LayerNormChannel, nn.BatchNorm2d).
EPS = 1e-5
# The classification head, which loaders of the layout want and FastVLM does not compute.
UNUSED = "head.proj"


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
        parts = [self._part(x, weight) for weight in self.weights]
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts, -1)
        return y if self.bias is None else y + self.bias

    def _part(self, x: mx.array, weight: mx.array) -> mx.array:
        if weight.ndim == 2:
            return x @ weight
        kernel, columns = weight.shape[2:]
        return mx.conv2d(x, weight, self.stride, kernel // 2, groups=x.shape[-1] // columns)


def _doubles(inputs: int, outputs: int) -> bool:
    """Whether a depthwise convolution is split into two."""
    return inputs > 1 and outputs == 2 * inputs


def _evens_first(array: mx.array) -> mx.array:
    return mx.concatenate([array[0::2], array[1::2]])


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


def layers(weights: Weights, config: VisionConfig) -> Iterator[Layer]:
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


def conv_exp(weights: Weights, config: VisionConfig) -> Iterator[Conv]:
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


def cast(layer: Layer, dtype: mx.Dtype) -> Layer:
    made: Layer
    if isinstance(layer, Conv):
        made = layer.cast(dtype)
    elif isinstance(layer, Activated):
        made = Activated(layer.conv.cast(dtype))
    elif isinstance(layer, RepMixerBlock):
        made = RepMixerBlock(layer.mixer.cast(dtype), _cast_ffn(layer.ffn, dtype))
    else:
        made = AttentionBlock(
            layer.qkv.cast(dtype), layer.proj.cast(dtype), _cast_ffn(layer.ffn, dtype)
        )
    return made


def _cast_ffn(ffn: tuple[Conv, Conv, Conv], dtype: mx.Dtype) -> tuple[Conv, Conv, Conv]:
    first, second, third = (conv.cast(dtype) for conv in ffn)
    return first, second, third
