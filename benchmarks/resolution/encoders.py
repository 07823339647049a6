"""The encoders, with random weights, in float32: how long one takes depends on its shape alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.synthetic import encoder_state_dict
from fastvlm_mlx.bundle.config import VisionConfig
from model_export.encoder.fastvithd import fold, resized

FASTVITHD, VIT, CONVNEXT, SIGLIP = "FastViTHD", "ViT-L/14", "ConvNeXt-L", "SigLIP-SO400M"
# Pixels of a side that one token stands for.
STRIDES = {FASTVITHD: 64, VIT: 14, CONVNEXT: 32, SIGLIP: 14}
# Sides of FastViTHD, and of the others where the paper has them.
SIZES = {
    FASTVITHD: (256, 512, 768, 1024, 1152, 1536),
    VIT: (224, 336),
    CONVNEXT: (768, 1024, 1536),
    SIGLIP: (384,),
}
# What is also encoded as a whole and as 2×2 tiles of half the side.
TILED = (512, 1024, 1152)
# FastViTHD's stages before the last: channels, and their side as a share of the image's.
STAGES = ((96, 4), (192, 8), (384, 16), (768, 32))


def tokens(encoder: str, size: int) -> int:
    """Of an image that is encoded as a whole."""
    # SigLIP leaves the pixels out that make no whole patch.
    return (size // STRIDES[encoder]) ** 2


@dataclass(frozen=True)
class Encoder:
    """A name, a size, and the call."""

    name: str
    size: int
    call: Callable[[], Tensor]

    def seconds(self) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            self.call()
        return time.perf_counter() - started


def build(sizes: dict[str, tuple[int, ...]]) -> list[Encoder]:
    """All of `sizes`; an encoder's sizes share its weights."""
    torch.manual_seed(0)
    made = {FASTVITHD: _fastvithd, VIT: _vit, CONVNEXT: _convnext, SIGLIP: _siglip}
    return [one for name, wanted in sizes.items() if wanted for one in made[name](wanted)]


def multi_scale(size: int) -> dict[str, Callable[[], Tensor]]:
    """What multi-scale features add to FastViTHD: the four earlier stages brought to the last
    one's places, by average pooling or by a depthwise convolution, and put beside its channels.

    The calls make [1, 3072 + 1440, side, side]; a projector reads the wider features.
    """
    side = size // STRIDES[FASTVITHD]
    stages = [
        torch.randn(1, dim, size // stride, size // stride).contiguous(
            memory_format=torch.channels_last
        )
        for dim, stride in STAGES
    ]
    last = torch.randn(1, 3072, side, side)
    steps = [STRIDES[FASTVITHD] // stride for _, stride in STAGES]
    convolutions = [
        nn.Conv2d(dim, dim, step, step, groups=dim).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for (dim, _), step in zip(STAGES, steps, strict=True)
    ]

    def pooled() -> Tensor:
        parts = [nn.functional.avg_pool2d(x, step) for x, step in zip(stages, steps, strict=True)]
        return torch.cat([last, *parts], 1)

    def convolved() -> Tensor:
        parts = [conv(x) for conv, x in zip(convolutions, stages, strict=True)]
        return torch.cat([last, *parts], 1)

    return {"average pooling": pooled, "depthwise convolution": convolved}


def _encoder(name: str, size: int, module: Callable[[Tensor], Tensor]) -> Encoder:
    pixels = torch.rand(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    return Encoder(name, size, lambda: module(pixels))


def _fastvithd(sizes: tuple[int, ...]) -> list[Encoder]:
    config = VisionConfig(image_size=sizes[0])
    folded = fold(encoder_state_dict(config), config)
    found = []
    for size in sizes:
        module = resized(folded, VisionConfig(image_size=size))
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found.append(_encoder(FASTVITHD, size, module))
    return found


def _vit(sizes: tuple[int, ...]) -> list[Encoder]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    model = CLIPVisionModel(config).eval()

    def encode(pixels: Tensor) -> Tensor:
        return model(pixels, interpolate_pos_encoding=True).last_hidden_state

    return [_encoder(VIT, size, encode) for size in sizes]


def _siglip(sizes: tuple[int, ...]) -> list[Encoder]:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    model = SiglipVisionModel(config).eval()
    return [_encoder(SIGLIP, size, lambda x: model(x).last_hidden_state) for size in sizes]


def _convnext(sizes: tuple[int, ...]) -> list[Encoder]:
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536])
    model = ConvNextModel(config).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return [_encoder(CONVNEXT, size, lambda x: model(x).last_hidden_state) for size in sizes]
