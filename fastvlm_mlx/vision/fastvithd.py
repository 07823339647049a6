"""FastViTHD in MLX: the encoder of an `mlx` bundle, [1, S, S, 3] → [1, S/64, S/64, C] inside.

The bundle holds the source's parameters one by one. What stands linearly before or after a
convolution or a product is folded into it when the encoder is made: BatchNorm, layer scale, the
channel norm's affine part, the scale of attention. On a GPU, heads are padded to a width that MLX
has fused attention for, and the whole is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from math import sqrt
from typing import Literal

import mlx.core as mx
import numpy as np

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.bundle.quantization import Quantization
from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.folded import (
    EPS,
    Activated,
    AttentionBlock,
    Conv,
    Layer,
    RepMixerBlock,
    Weights,
    cast,
    conv_exp,
    layers,
)

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
        self._layers = [cast(layer, self._dtype) for layer in layers(weights, config)]
        self._conv_exp, *excite = (conv.cast(self._dtype) for conv in conv_exp(weights, config))
        self._se = (excite[0], excite[1])
        weights.check_all_taken()
        mx.clear_cache()
        self._run = mx.compile(self.graph) if device else self.graph

    def at(self, config: VisionConfig) -> FastViTHD:
        """The same encoder for another size of images, with the same weights."""
        other = copy(self)
        other.image_size, other.num_tokens = config.image_size, config.num_tokens
        return other

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
        normed = self._op(mx.fast.layer_norm(x, None, None, EPS))
        attend = self._fused if self._device else self._written_out
        mixed = self._op(attend(layer.qkv, normed).swapaxes(1, 2).reshape(x.shape))
        return self._op(layer.proj(mixed))

    def _fused(self, qkv: Conv, x: mx.array) -> mx.array:
        """As a GPU has it: scores and softmax are never written."""
        # Nothing elementwise comes next that the addition could be joined with.
        x = qkv(x) if qkv.bias is None else mx.addmm(qkv.bias, x, qkv.weights[0])
        q, k, v = self._heads(x, self._pad)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)[..., : self._head_dim]

    def _written_out(self, qkv: Conv, x: mx.array) -> mx.array:
        """What MLX falls back to where it has no fused kernel, as it has none for mlx-vlm on Metal.

        So what is observed has the scores, too, which are rounded and may overflow.
        """
        q, k, v = self._heads(self._op(qkv(x)))
        scores = self._op(q @ k.swapaxes(-1, -2))
        return self._op(mx.softmax(scores, axis=-1, precise=True)) @ v

    def _heads(self, x: mx.array, pad: int = 0) -> list[mx.array]:
        """[B, H, W, 3 · C] → three of [B, heads, H · W, head width], none of them copied."""
        x = mx.unflatten(x.flatten(1, 2), -1, (3, -1, self._head_dim))
        if pad:
            x = mx.pad(x, [(0, 0)] * 4 + [(0, pad)])
        return [part.squeeze(2).swapaxes(1, 2) for part in mx.split(x, 3, 2)]


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


def _in_order(x: mx.array) -> mx.array:
    """Even outputs and after them odd ones, as a split convolution has them, → one by one."""
    return mx.unflatten(x, -1, (2, -1)).swapaxes(-1, -2).flatten(-2)


def _mean(x: mx.array) -> mx.array:
    """[B, H, W, C] → [B, 1, 1, C] in x's type.

    The sum is float32: in half precision that of 256 places of 256 is infinite already.
    """
    return x.astype(mx.float32).mean((1, 2), keepdims=True).astype(x.dtype)


def _gelu(x: mx.array, op: Observe) -> mx.array:
    """Exact GELU. Halved first: x · (1 + erf) overflows from half of the range on."""
    # nn.gelu is compiled on its own, which on a CPU calls the system's C++ compiler.
    return op(op(0.5 * x) * op(1 + op(mx.erf(op(x * sqrt(0.5))))))
