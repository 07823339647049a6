"""What an export is asked for: frozen, and checked before anything is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastvlm_mlx.config import AFFINE_BITS, AFFINE_GROUP_SIZES, FastVLMConfig
from fastvlm_mlx.errors import OptionError

BITS = (*AFFINE_BITS, 16)
GROUP_SIZES = AFFINE_GROUP_SIZES
DTYPES = ("float16", "bfloat16", "float32")
PRECISIONS = ("fp16", "fp32")
LAYOUTS = ("app", "mlx")
FORMATS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
IMAGE_SIZE_MULTIPLE = 64
FLOAT16_MAX = 65_504

# What the numeric gates ask for. The encoder's floors are signal-to-noise ratios in dB, RMS of
# the reference over RMS of the error. The LLM's are the mean KL divergence, in nats, of the
# next-token distribution from the source's, and the share of positions where both choose the
# same token, counted where the source gives its choice at least twice the probability of its
# second: nearer ties may fall either way.
ENCODER_SNR_DB = {"fp32": 80.0, "fp16": 35.0, "bf16": 20.0}
LLM_KL_NATS = {2: 5.0, 3: 2.0, 4: 0.5, 5: 0.2, 6: 0.1, 8: 0.05, 16: 0.01}
LLM_AGREEMENT = {2: 0.2, 3: 0.5, 4: 0.8, 5: 0.9, 6: 0.95, 8: 0.95, 16: 0.99}


@dataclass(frozen=True)
class ExportOptions:
    """`llm_bits` 16 means not quantized: the weights are cast to `dtype` and left at that.

    `image_size`, in pixels, is the encoder's input in place of the checkpoint's own.
    """

    llm_bits: int = 8
    group_size: int = 64
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    encoder_precision: Literal["fp16", "fp32"] = "fp16"
    layout: Literal["app", "mlx"] = "app"
    overwrite: bool = False
    allow_failed_gates: bool = False
    image_size: int | None = None
    min_snr_db: float | None = None
    max_kl_nats: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("llm_bits", BITS),
            ("group_size", GROUP_SIZES),
            ("dtype", DTYPES),
            ("encoder_precision", PRECISIONS),
            ("layout", LAYOUTS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise OptionError(
                    f"--{name.replace('_', '-')} is {value}: expected one of "
                    f"{', '.join(map(str, allowed))}"
                )
        if self.layout == "mlx" and self.encoder_precision != "fp16":
            raise OptionError(
                f"--encoder-precision {self.encoder_precision} is for Core ML's encoder, and an "
                "mlx bundle's has the type of everything else: use --dtype float32"
            )
        size = self.image_size
        if size is not None and (size <= 0 or size % IMAGE_SIZE_MULTIPLE):
            raise OptionError(
                f"--image-size is {size}: expected a multiple of {IMAGE_SIZE_MULTIPLE} pixels, the "
                "encoder's stride"
            )
        for name in ("min_snr_db", "max_kl_nats", "min_agreement"):
            value = getattr(self, name)
            if value is not None and (value != value or value < 0):
                raise OptionError(f"--{name.replace('_', '-')} is {value}: expected zero or more")
        if self.min_agreement is not None and self.min_agreement > 1:
            raise OptionError(f"--min-agreement is {self.min_agreement}: expected a share up to 1")

    @property
    def quantized(self) -> bool:
        return self.llm_bits != 16

    @property
    def encoder_format(self) -> str:
        """fp16, bf16 or fp32. In an `mlx` bundle the encoder has the type of everything else,
        because mlx-vlm's projector and language model compute in whatever it hands them."""
        return self.encoder_precision if self.layout == "app" else FORMATS[self.dtype]

    @property
    def snr_floor_db(self) -> float:
        floor = self.min_snr_db
        return ENCODER_SNR_DB[self.encoder_format] if floor is None else floor

    @property
    def kl_ceiling_nats(self) -> float:
        ceiling = self.max_kl_nats
        return LLM_KL_NATS[self.llm_bits] if ceiling is None else ceiling

    @property
    def agreement_floor(self) -> float:
        floor = self.min_agreement
        return LLM_AGREEMENT[self.llm_bits] if floor is None else floor

    def check_widths(self, config: FastVLMConfig) -> None:
        """Every width that gets quantized must be a multiple of the group size.

        Raises:
            OptionError: naming the width, and the group sizes that divide it.
        """
        if not self.quantized:
            return
        text = config.text
        widths = {
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
        }
        for name, width in widths.items():
            if width % self.group_size:
                fitting = [str(g) for g in GROUP_SIZES if all(w % g == 0 for w in widths.values())]
                advice = (
                    f"use --group-size {' or '.join(fitting)}"
                    if fitting
                    else "no group size divides it, use --llm-bits 16"
                )
                raise OptionError(
                    f"{name} {width} is no multiple of the group size {self.group_size}: {advice}"
                )

    def resolved(self) -> dict[str, Any]:
        """The options as the manifest records them, floors included."""
        data = asdict(self)
        data |= {
            "encoder_precision": self.encoder_format,
            "min_snr_db": self.snr_floor_db,
            "max_kl_nats": self.kl_ceiling_nats,
            "min_agreement": self.agreement_floor,
        }
        if not self.quantized:
            data["group_size"] = None
        del data["overwrite"]
        return data
