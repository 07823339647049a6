"""FastViTHD in torch, written for export and for the Neural Engine.

Four choices, and what each is for:

- BatchNorm, layer scale, the affine part of channel norm and the softmax scale are folded into
  the neighbouring convolution, so that ConvFFN is conv, conv, gelu, conv, add.
- Channel norm is `z * rsqrt(mean(z * z) + eps)`, the form that Core ML's converter fuses into one
  `layer_norm` without transposes. The source's own `pow(2)` stays five element-wise ops and
  overflows fp16 past |x - mean| = 255.
- Attention is two products on [1, heads, 32, N] with constant shapes, and every linear layer a
  1×1 convolution: the Neural Engine wants a last axis of at least 32 and few transposes
  (apple/ml-ane-transformers).
- The mean of squeeze and excite adds up what was divided first, rows and then columns, so that no
  sum on its way is larger than the largest of its terms, whatever type a kernel sums in.

Parameters keep the checkpoint's names where they still exist; the classification head, which
FastVLM does not compute, has none.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import CheckpointError

_NORM_EPS = 1e-5  # mci.py, LayerNormChannel; also nn.BatchNorm2d's default


class ChannelNorm(nn.Module):
    """Zero mean, unit variance over the channels of [1, C, H, W]; the affine part is in qkv."""

    def forward(self, x: Tensor) -> Tensor:
        z = x - x.mean(1, keepdim=True)
        return z * torch.rsqrt((z * z).mean(1, keepdim=True) + _NORM_EPS)


class SEBlock(nn.Module):
    """Squeeze and excite, [1, C, H, W] → the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduce = nn.Conv2d(dim, dim // 16, 1)
        self.expand = nn.Conv2d(dim // 16, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Divided before anything is summed: no kernel's half-precision sum can overflow.
        gate = (x * (1 / x.shape[2])).mean(3, keepdim=True).sum(2, keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(gate))))


class MobileOneBlock(nn.Module):
    """Convolution, squeeze and excite where asked for, GELU."""

    def __init__(
        self, dim_in: int, dim: int, kernel: int, stride: int = 1, groups: int = 1, se: bool = False
    ):
        super().__init__()
        self.se = SEBlock(dim) if se else nn.Identity()
        self.reparam_conv = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.se(self.reparam_conv(x)))


class Depthwise(nn.Module):
    """The depthwise convolution of RepMixer and of the positional encoding."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.reparam_conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.reparam_conv(x)


class ReparamLargeKernelConv(nn.Module):
    """Strided grouped convolution and GELU: the first half of a patch embedding."""

    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.lkb_reparam = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=dim_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.lkb_reparam(x))


class PatchEmbed(nn.Module):
    """[1, C, H, W] → [1, C', H/2, W/2] between stages."""

    def __init__(self, dim_in: int, dim: int, config: VisionConfig):
        super().__init__()
        self.proj = nn.Sequential(
            ReparamLargeKernelConv(dim_in, dim, config.down_patch_size, config.down_stride),
            MobileOneBlock(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ConvFFN(nn.Module):
    """Depthwise 7×7 with its BatchNorm folded in, fc1, GELU, fc2 with the layer scale folded in."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv", nn.Conv2d(dim, dim, 7, padding=3, groups=dim))
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class MHSA(nn.Module):
    """Self-attention over the pixels of [1, C, H, W]; the checkpoint orders qkv, head, channel."""

    def __init__(self, dim: int, head_dim: int, side: int):
        super().__init__()
        self.dim, self.side = dim, side
        self.heads, self.head_dim = dim // head_dim, head_dim
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(1, 3 * self.heads, self.head_dim, self.side**2)
        q, k, v = qkv.split(self.heads, dim=1)
        attention = (q.transpose(2, 3) @ k).softmax(-1)
        mixed = v @ attention.transpose(2, 3)
        return self.proj(mixed.reshape(1, self.dim, self.side, self.side))


class RepMixerBlock(nn.Module):
    """Depthwise token mixing, then ConvFFN around a residual."""

    def __init__(self, dim: int, hidden: int, kernel: int):
        super().__init__()
        self.token_mixer = Depthwise(dim, kernel)
        self.convffn = ConvFFN(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.convffn(x)


class AttentionBlock(nn.Module):
    """Channel norm and attention around a residual, then ConvFFN around another."""

    def __init__(self, dim: int, hidden: int, head_dim: int, side: int):
        super().__init__()
        self.norm = ChannelNorm()
        self.token_mixer = MHSA(dim, head_dim, side)
        self.convffn = ConvFFN(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mixer(self.norm(x))
        return x + self.convffn(x)


class FastViTHD(nn.Module):
    """float32 [1, 3, S, S] → [1, N, C], row-major over the feature map of `conv_exp`.

    S, N and the batch of one are constants of the graph.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        dims = config.embed_dims
        self.patch_embed = nn.Sequential(
            MobileOneBlock(3, dims[0], 3, 2),
            MobileOneBlock(dims[0], dims[0], 3, 2, groups=dims[0]),
            MobileOneBlock(dims[0], dims[0], 1),
        )
        side = config.image_size // 4
        network: list[nn.Module] = []
        for stage, dim in enumerate(dims):
            if stage:
                network.append(PatchEmbed(dims[stage - 1], dim, config))
                side //= config.down_stride
            position = config.pos_embs_shapes[stage]
            if position is not None:
                network.append(Depthwise(dim, position))
            hidden = int(dim * config.mlp_ratios[stage])
            attention = config.token_mixers[stage] == "attention"
            network.append(
                nn.Sequential(
                    *(
                        AttentionBlock(dim, hidden, config.head_dim, side)
                        if attention
                        else RepMixerBlock(dim, hidden, config.repmixer_kernel_size)
                        for _ in range(config.layers[stage])
                    )
                )
            )
        self.network = nn.ModuleList(network)
        self.conv_exp = MobileOneBlock(dims[-1], config.hidden_size, 3, groups=dims[-1], se=True)
        self.num_tokens, self.hidden_size = config.num_tokens, config.hidden_size

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        for module in self.network:
            x = module(x)
        x = self.conv_exp(x)
        return x.reshape(1, self.hidden_size, self.num_tokens).transpose(1, 2)


def fold(state_dict: Mapping[str, Tensor], config: VisionConfig) -> FastViTHD:
    """Build the module for export from the checkpoint's tensors.

    Args:
        state_dict: the names of `model_export.encoder.reference.FastViTHD`, any float dtype.
        config: the shape the tensors have.

    Returns:
        A float32, contiguous module in evaluation mode, on the CPU, that owns its weights.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape than `config` says.
    """
    with torch.device("meta"):
        module = FastViTHD(config)
    state = _Source(state_dict)
    folded: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, child in module.named_modules():
            if isinstance(child, RepMixerBlock):
                _fold_ffn(folded, state, f"{name}.convffn", f"{name}.layer_scale")
            elif isinstance(child, AttentionBlock):
                _fold_attention(folded, state, name, config.head_dim)
                _fold_ffn(folded, state, f"{name}.convffn", f"{name}.layer_scale_2")
        for name, parameter in module.named_parameters():
            if name not in folded:
                folded[name] = state.take(name)
            if folded[name].shape != parameter.shape:
                raise CheckpointError(
                    f"encoder tensor {name} has shape {list(folded[name].shape)}: expected "
                    f"{list(parameter.shape)}, so the checkpoint's config does not describe its "
                    "weights"
                )
    state.take("head.proj")
    state.finish()
    module.load_state_dict(folded, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def resized(module: FastViTHD, config: VisionConfig) -> FastViTHD:
    """The same weights, in the same memory, at the input size of `config`."""
    with torch.device("meta"):
        other = FastViTHD(config)
    other.load_state_dict(module.state_dict(), strict=True, assign=True)
    return other.eval().requires_grad_(False)


class _Source:
    """The checkpoint's tensors, each taken once and widened to float32."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._unused = set(tensors)

    def take(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(
                f"encoder tensor {name} is missing: expected every tensor of FastViTHD, use a "
                "complete checkpoint"
            )
        self._unused.discard(name)
        # A copy, so that folding never writes to what the caller (or a mapped file) holds; in rows,
        # because torch.export refuses a channels-last weight.
        return (
            self._tensors[name]
            .detach()
            .to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        )

    def finish(self) -> None:
        # BatchNorm's step counter is the one tensor that carries no weight.
        left = sorted(n for n in self._unused if not n.endswith(".num_batches_tracked"))
        if left:
            raise CheckpointError(
                f"{len(left)} encoder tensors have no place in FastViTHD, the first is {left[0]}: "
                "expected the re-parameterized inference form of the encoder"
            )


def _fold_ffn(out: MutableMapping[str, Tensor], state: _Source, name: str, scale: str) -> None:
    bn = f"{name}.conv.bn"
    gain = state.take(f"{bn}.weight") * torch.rsqrt(state.take(f"{bn}.running_var") + _NORM_EPS)
    shift = state.take(f"{bn}.bias") - state.take(f"{bn}.running_mean") * gain
    out[f"{name}.conv.conv.weight"] = state.take(f"{name}.conv.conv.weight").mul_(_rows(gain))
    out[f"{name}.conv.conv.bias"] = shift
    layer_scale = state.take(scale).flatten()
    out[f"{name}.fc2.weight"] = state.take(f"{name}.fc2.weight").mul_(_rows(layer_scale))
    out[f"{name}.fc2.bias"] = state.take(f"{name}.fc2.bias").mul_(layer_scale)


def _fold_attention(
    out: MutableMapping[str, Tensor], state: _Source, name: str, head_dim: int
) -> None:
    weight = state.take(f"{name}.token_mixer.qkv.weight")
    dim = weight.shape[1]
    bias = weight @ state.take(f"{name}.norm.bias")
    weight.mul_(state.take(f"{name}.norm.weight"))
    weight[:dim] *= head_dim**-0.5
    bias[:dim] *= head_dim**-0.5
    out[f"{name}.token_mixer.qkv.weight"] = weight[:, :, None, None]
    out[f"{name}.token_mixer.qkv.bias"] = bias
    layer_scale = state.take(f"{name}.layer_scale_1").flatten()
    proj = state.take(f"{name}.token_mixer.proj.weight").mul_(layer_scale[:, None])
    out[f"{name}.token_mixer.proj.weight"] = proj[:, :, None, None]
    out[f"{name}.token_mixer.proj.bias"] = state.take(f"{name}.token_mixer.proj.bias").mul_(
        layer_scale
    )


def _rows(vector: Tensor) -> Tensor:
    """[O] → [O, 1, 1, 1], to scale the outputs of a convolution."""
    return vector[:, None, None, None]
