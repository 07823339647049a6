"""FastViTHD in torch as the checkpoint holds it: nothing folded, every parameter by its own name.

The independent side of the encoder's numeric gate, and the module the demo checkpoint is
trained with. Follows the released inference form of the encoder
(apple/ml-fastvlm, llava/model/multimodal_encoder/mobileclip/mci.py): the convolutions are
already re-parameterized, BatchNorm is left in ConvFFN only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm_mlx.bundle.config import VisionConfig


class LayerNormChannel(nn.Module):
    """Normalize over channels of [B, C, H, W]; eps 1e-5 and biased variance as in the source."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-5)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class SEBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.reduce = nn.Conv2d(dim, dim // 16, 1)
        self.expand = nn.Conv2d(dim // 16, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(gate))))


class MobileOneBlock(nn.Module):
    def __init__(
        self, dim_in: int, dim: int, kernel: int, stride: int = 1, groups: int = 1, se: bool = False
    ):
        super().__init__()
        self.se = SEBlock(dim) if se else nn.Identity()
        self.reparam_conv = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.se(self.reparam_conv(x)))


class Reparam(nn.Module):
    """A depthwise convolution under the name `reparam_conv`: RepMixer and RepCPE."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.reparam_conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.reparam_conv(x)


class ReparamLargeKernelConv(nn.Module):
    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.lkb_reparam = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=dim_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.lkb_reparam(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim_in: int, dim: int, config: VisionConfig):
        super().__init__()
        self.proj = nn.Sequential(
            ReparamLargeKernelConv(dim_in, dim, config.down_patch_size, config.down_stride),
            MobileOneBlock(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ConvFFN(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv", nn.Conv2d(dim, dim, 7, padding=3, groups=dim, bias=False))
        self.conv.add_module("bn", nn.BatchNorm2d(dim))
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class MHSA(nn.Module):
    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(b, h * w, 3, c // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        tokens = (attention @ v).transpose(1, 2).reshape(b, h * w, c)
        return self.proj(tokens).transpose(1, 2).reshape(b, c, h, w)


class RepMixerBlock(nn.Module):
    def __init__(self, dim: int, hidden: int, kernel: int):
        super().__init__()
        self.token_mixer = Reparam(dim, kernel)
        self.convffn = ConvFFN(dim, hidden)
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class AttentionBlock(nn.Module):
    def __init__(self, dim: int, hidden: int, head_dim: int):
        super().__init__()
        self.norm = LayerNormChannel(dim)
        self.token_mixer = MHSA(dim, head_dim)
        self.convffn = ConvFFN(dim, hidden)
        self.layer_scale_1 = nn.Parameter(torch.full((dim, 1, 1), 1e-5))
        self.layer_scale_2 = nn.Parameter(torch.full((dim, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        return x + self.layer_scale_2 * self.convffn(x)


class GlobalPool2D(nn.Module):
    """The classification head: in the checkpoint, not part of what FastVLM computes."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(dim, out))


class FastViTHD(nn.Module):
    """float32 [B, 3, S, S] → [B, N, C], row-major over the feature map of `conv_exp`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        dims = config.embed_dims
        self.patch_embed = nn.Sequential(
            MobileOneBlock(3, dims[0], 3, 2),
            MobileOneBlock(dims[0], dims[0], 3, 2, groups=dims[0]),
            MobileOneBlock(dims[0], dims[0], 1),
        )
        network: list[nn.Module] = []
        for stage, dim in enumerate(dims):
            if stage:
                network.append(PatchEmbed(dims[stage - 1], dim, config))
            position = config.pos_embs_shapes[stage]
            if position is not None:
                network.append(Reparam(dim, position))
            hidden = int(dim * config.mlp_ratios[stage])
            attention = config.token_mixers[stage] == "attention"
            network.append(
                nn.Sequential(
                    *(
                        AttentionBlock(dim, hidden, config.head_dim)
                        if attention
                        else RepMixerBlock(dim, hidden, config.repmixer_kernel_size)
                        for _ in range(config.layers[stage])
                    )
                )
            )
        self.network = nn.ModuleList(network)
        self.conv_exp = MobileOneBlock(dims[-1], config.hidden_size, 3, groups=dims[-1], se=True)
        self.head = GlobalPool2D(config.hidden_size, config.projection_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        for module in self.network:
            x = module(x)
        return self.conv_exp(x).flatten(2).transpose(1, 2)
