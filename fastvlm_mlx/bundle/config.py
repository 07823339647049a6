"""What a FastVLM is, as frozen dataclasses: encoder, language model, and the two together.

Key names are those of Apple's `config.json` (`model_type` `llava_qwen2`) and of the
`vision_config` that mlx-vlm and mlx-swift-lm write.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Annotated, Any

from msgspec import Meta

from fastvlm_mlx.bundle.quantization import Quantization
from fastvlm_mlx.bundle.schema import Count, Layers, Positive, Width, check
from fastvlm_mlx.errors import ConfigError

MODEL_TYPE = "llava_qwen2"
TRANSFORMERS_MODEL_TYPE = "fast_vlm"
IMAGE_TOKEN = "<image>"
# The encoder's input in pixels along one side: twice what FastVLM was trained at. There attention
# alone takes 1.6 GB; at twice that size, sixteen times as much.
MAX_IMAGE_SIZE = 2048
CORRECT = "correct it"
# llava/constants.py of apple/ml-fastvlm: the id that stands for an image in the reference's
# own ids. Ours are in the vocabulary; this one is only ever compared with.
REFERENCE_IMAGE_TOKEN_INDEX = -200


ImageSize = Annotated[int, Meta(ge=1, le=MAX_IMAGE_SIZE)]
Kernel = Annotated[int, Meta(ge=1, le=63)]
# Whole ones stay whole: widths are multiplied by them.
Ratio = Annotated[int, Meta(ge=1, le=64)] | Annotated[float, Meta(gt=0, le=64)]
Stages = Meta(min_length=1, max_length=8)


def _one_number(value: Any) -> Any:
    """A list whose kernels are given as [k, k], as mlx-vlm writes them, with k in their place."""
    if not isinstance(value, list):
        return value
    square = [v for v in value if isinstance(v, list) and len(v) == 2 and v[0] == v[1]]
    return [v[0] if any(v is pair for pair in square) else v for v in value]


@dataclass(frozen=True)
class VisionConfig:
    """FastViTHD. The defaults are MobileCLIP-L's (`mobileclip_l_1024`)."""

    image_size: ImageSize = 1024
    layers: Annotated[tuple[Annotated[int, Meta(ge=1, le=256)], ...], Stages] = (2, 12, 24, 4, 2)
    embed_dims: Annotated[tuple[Width, ...], Stages] = (96, 192, 384, 768, 1536)
    mlp_ratios: Annotated[tuple[Ratio, ...], Stages] = (4, 4, 4, 4, 4)
    token_mixers: Annotated[tuple[str, ...], Stages] = (
        "repmixer",
        "repmixer",
        "repmixer",
        "attention",
        "attention",
    )
    pos_embs_shapes: Annotated[tuple[Kernel | None, ...], Stages] = (None, None, None, 7, 7)
    repmixer_kernel_size: Kernel = 3
    down_patch_size: Kernel = 7
    down_stride: Annotated[int, Meta(ge=1, le=8)] = 2
    cls_ratio: Ratio = 2.0
    head_dim: Width = 32
    projection_dim: Width = 768

    def __post_init__(self) -> None:
        stages = len(self.layers)
        for name in ("embed_dims", "mlp_ratios", "token_mixers", "pos_embs_shapes"):
            if len(getattr(self, name)) != stages:
                raise ConfigError(
                    f"config.json: vision_config.{name} has {len(getattr(self, name))} entries "
                    "where layers has "
                    f"{stages}: give one for each stage"
                )
        widths = (*self.embed_dims, self.hidden_size)
        for narrow, wide in pairwise(widths):
            # The depthwise convolutions between stages widen channel by channel.
            if wide < narrow or wide % narrow:
                raise ConfigError(
                    f"config.json: vision_config has {narrow} channels before {wide}: expected "
                    "each stage's to "
                    "be a multiple of the one before"
                )
        for mixer, dim in zip(self.token_mixers, self.embed_dims, strict=True):
            if mixer not in ("repmixer", "attention"):
                raise ConfigError(
                    f"config.json: vision_config.token_mixers holds {mixer!r}: expected "
                    "repmixer or attention"
                )
            if mixer == "attention" and dim % self.head_dim:
                raise ConfigError(
                    f"config.json: vision_config.embed_dims holds {dim} for an attention "
                    "stage: expected a "
                    f"multiple of the head width {self.head_dim}"
                )
        if not 0 < self.image_size <= MAX_IMAGE_SIZE or self.image_size % self.patch_size:
            raise ConfigError(
                f"the image size {self.image_size} is not a positive multiple of "
                f"{self.patch_size}, the encoder's stride, up to {MAX_IMAGE_SIZE:,}: choose one "
                "that is"
            )

    @property
    def patch_size(self) -> int:
        """Pixels of the input under one output token, along one side (64 for FastViTHD)."""
        return 4 * self.down_stride ** (len(self.layers) - 1)

    @property
    def grid(self) -> int:
        """Output tokens along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N, tokens per image."""
        return self.grid**2

    @property
    def hidden_size(self) -> int:
        """C, channels of the output (3072 for FastViTHD)."""
        return int(self.embed_dims[-1] * self.cls_ratio)

    @property
    def is_mobileclip_l(self) -> bool:
        """Whether it is the published encoder, at any image size."""
        return self == VisionConfig(image_size=self.image_size)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VisionConfig:
        """Read a `vision_config`; keys that are not FastViTHD's shape are left out.

        Raises:
            ConfigError: a value of the wrong kind, or one that contradicts another.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"config.json: vision_config is {data!r}: expected a JSON object")
        known = {f.name: _one_number(data[f.name]) for f in fields(cls) if f.name in data}
        config = check(known, cls, "config.json: vision_config", ConfigError, remedy=CORRECT)
        hidden = data.get("hidden_size")
        if hidden is not None and hidden not in (config.hidden_size, 1024):
            # mlx-vlm's default of 1024 stands in bundles of MobileCLIP-L and means nothing.
            raise ConfigError(
                f"config.json: vision_config.hidden_size is {hidden} but embed_dims and "
                "cls_ratio make "
                f"{config.hidden_size}: correct one of them"
            )
        return config

    @classmethod
    def from_tower_name(cls, name: str) -> VisionConfig:
        """`mobileclip_l_1024` → MobileCLIP-L at 1024×1024, as the reference reads the name."""
        match = re.fullmatch(r"(?:.*/)?mobileclip_l_(\d+)", str(name))
        if not match:
            raise ConfigError(
                f"config.json: mm_vision_tower is {name!r}: expected mobileclip_l_SIZE "
                "(FastViTHD), or a "
                "vision_config that describes the encoder"
            )
        size = match.group(1)
        # A number of five thousand digits is a text that int() refuses.
        return cls.from_dict({"image_size": int(size) if len(size) < 10 else size})

    def to_dict(self) -> dict[str, Any]:
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {**data, "hidden_size": self.hidden_size, "patch_size": self.patch_size}


@dataclass(frozen=True)
class TextConfig:
    """Qwen2, under the keys of its `config.json`."""

    hidden_size: Width
    num_hidden_layers: Layers
    intermediate_size: Width
    num_attention_heads: Width
    num_key_value_heads: Width
    vocab_size: Count
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 1_000_000.0
    max_position_embeddings: Count = 32_768
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"config.json: hidden_size {self.hidden_size} is not a multiple of "
                "num_attention_heads "
                f"{self.num_attention_heads}: correct config.json"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: correct config.json"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TextConfig:
        """Read Qwen2's keys, from the top level.

        Raises:
            ConfigError: a key is missing or is not a number, or RoPE is scaled.
        """
        rope = data.get("rope_parameters")
        if isinstance(rope, dict):
            # transformers 5 writes RoPE's settings here.
            data = {"rope_theta": rope.get("rope_theta"), **data}
            if rope.get("rope_type", "default") != "default":
                data = {**data, "rope_scaling": rope}
        if scaling := data.get("rope_scaling"):
            raise ConfigError(
                f"config.json scales RoPE ({scaling}): FastVLM's Qwen2 does not, remove "
                "rope_scaling"
            )
        known = {f.name: v for f in fields(cls) if (v := data.get(f.name)) is not None}
        if "num_attention_heads" in known:
            known.setdefault("num_key_value_heads", known["num_attention_heads"])
        missing = [
            name
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "intermediate_size",
                "num_attention_heads",
                "vocab_size",
            )
            if name not in known
        ]
        if missing:
            raise ConfigError(
                f"config.json lacks {', '.join(missing)}: expected a Qwen2 configuration"
            )
        return check(known, cls, "config.json", ConfigError, remedy=CORRECT)


@dataclass(frozen=True)
class _Meeting:
    """The keys of config.json that are neither the encoder's nor the language model's."""

    image_aspect_ratio: str | None = None
    image_token_index: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class FastVLMConfig:
    """The encoder, the language model, and how they meet."""

    text: TextConfig
    vision: VisionConfig
    image_aspect_ratio: str | None
    image_token_index: int
    dtype: str
    quantization: Quantization | None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FastVLMConfig:
        """Read a `llava_qwen2` config.json: a checkpoint's, one of our bundles' or Apple's.

        Raises:
            ConfigError: another architecture, another projector, or keys that contradict.
        """
        model_type = data.get("model_type")
        if model_type != MODEL_TYPE:
            raise ConfigError(
                f"config.json says model_type {model_type!r}, which is not FastVLM: expected "
                f"{MODEL_TYPE!r}"
            )
        if data.get("vision_config"):
            vision = VisionConfig.from_dict(data["vision_config"])
        elif data.get("mm_vision_tower"):
            vision = VisionConfig.from_tower_name(data["mm_vision_tower"])
        else:
            vision = VisionConfig()
        projector = data.get("mm_projector_type", "mlp2x_gelu")
        if projector != "mlp2x_gelu":
            raise ConfigError(
                f"config.json: mm_projector_type is {projector!r}: expected mlp2x_gelu, FastVLM's"
            )
        if data.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
            raise ConfigError(
                f"config.json: mm_hidden_size is {data['mm_hidden_size']} but the encoder makes "
                f"{vision.hidden_size} channels: correct config.json"
            )
        meeting = check(data, _Meeting, "config.json", ConfigError, remedy=CORRECT)
        index = meeting.image_token_index
        quantization = data.get("quantization")
        return cls(
            text=TextConfig.from_dict(data),
            vision=vision,
            image_aspect_ratio=meeting.image_aspect_ratio,
            image_token_index=REFERENCE_IMAGE_TOKEN_INDEX if index is None else index,
            dtype=meeting.torch_dtype or meeting.dtype or "float16",
            quantization=None if quantization is None else Quantization.from_dict(quantization),
        )


def fits_mlx_vlm(vision: VisionConfig) -> dict[str, Any]:
    """What the manifest and `inspect` say of mlx-vlm as it is released, which builds MobileCLIP-L
    whatever `vision_config` says; only the size is free."""
    released = VisionConfig(image_size=vision.image_size)
    for name, value in released.to_dict().items():
        found = vision.to_dict()[name]
        if found != value:
            misfit = f"its encoder has {name} {found} and mlx-vlm builds the released one's {value}"
            return {"fits_unmodified_mlx_vlm": False, "misfit": misfit}
    return {"fits_unmodified_mlx_vlm": True}
