"""What an export is asked for: frozen, and checked before anything is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Literal

from fastvlm_mlx.bundle.quantization import MODES, Format
from fastvlm_mlx.bundle.schema import check_fields
from fastvlm_mlx.errors import OptionError
from model_export.loaders import LOADERS

# Every layout's; what a layout's own loaders lack is refused where the layout is known.
BITS = (*MODES["affine"][0], 16)
GROUP_SIZES = MODES["affine"][1]
OWN = -1  # the mode's own number
DEFAULT_FORMAT = Format(bits=8, group_size=64)
DTYPES = ("float16", "bfloat16", "float32")
# The encoder's, with the first system that loads each. Table look-ups and 8-bit weights came with
# iOS 16 and macOS 13.
PRECISIONS = {
    "fp16": "iOS15",
    "fp32": "iOS15",
    "int8": "iOS16",
    "palette6": "iOS16",
    "palette4": "iOS16",
    "mixed": "iOS16",
}
TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18")
# The first that loads a package of several functions.
FUNCTIONS_TARGET = "iOS18"
DEFAULT_ENCODER_BPW = 6.0
LAYOUTS = tuple(LOADERS)
METHODS = ("rtn", "awq", "gptq", "dwq")
FORMATS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
IMAGE_SIZE_MULTIPLE = 64
RELEASED_SIZE = 1024
FLOAT16_MAX = 65_504
_OPTIONAL = ("embed_bits", "head_bits", "deployment_target")

# What the numeric gates ask for. The encoder's floors are signal-to-noise ratios in dB, RMS of
# the reference over RMS of the error. A compressed encoder has by itself only to be louder than
# its noise; what it costs, the answers show.
ENCODER_SNR_DB = {"fp32": 80.0, "fp16": 35.0, "bf16": 20.0}
COMPRESSED_SNR_DB = 0.0
WEIGHTS_SNR_DB = {"int8": 30.0, "palette6": 20.0, "palette4": 10.0, "mixed": 5.0}
ENCODER_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "palette6": 6, "palette4": 4}
PALETTE_BITS = {"palette4": 4, "palette6": 6, "palette8": 8}


@dataclass(frozen=True)
class ExportOptions:
    """16 bits mean not quantized: the weights are cast to `dtype` and left at that.

    Attributes:
        llm_bits, group_size: of the language model's matrices; unless given the mode's own, for
            affine 8 bits in groups of 64.
        llm_mode: affine, or a mode that has its own bits and group size.
        embed_bits, head_bits: of the embedding and of an untied head in place of `llm_bits`.
        projector_bits: of the projector's two matrices.
        recipe: a file, or the name of a stock recipe, that says which layer gets which bits.
        llm_bpw: bits per weight, scales and what is not quantized included, for which the best
            assignment of bits is searched.
        method: how the layers' weights are quantized: rtn rounds each to the nearest, the others
            look at calibration data.
        calibration: images or JSON lines that the search and a mixed encoder are measured on, and
            the method looks at.
        encoder_precision: fp32 and fp16 as computed; the others are stored in fewer bits and
            computed in fp16.
        encoder_bpw: bits per weight that `mixed` is given, 6 unless said otherwise.
        deployment_target: the first iOS that loads the encoder. Unless given, the first possible;
            of fp32 iOS 16, as Apple's own.
        preset: the name of the set that some of these come from; for the record.
        image_size: the encoder's input in pixels in place of the checkpoint's own.
        image_sizes: several, which share the weights; `default_size` of them runs unless another
            is asked for.
        image_input: the Core ML encoder takes 8-bit RGB images in place of float32 arrays.
        min_snr_db, max_kl_nats, min_agreement: the gates' limits in place of their own.
    """

    llm_bits: int = OWN
    group_size: int = OWN
    llm_mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"
    embed_bits: int | None = None
    head_bits: int | None = None
    projector_bits: int = 16
    recipe: str | None = None
    llm_bpw: float | None = None
    method: Literal["rtn", "awq", "gptq", "dwq"] = "rtn"
    calibration: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    encoder_precision: Literal["fp16", "fp32", "int8", "palette6", "palette4", "mixed"] = "fp16"
    encoder_bpw: float | None = None
    deployment_target: Literal["iOS15", "iOS16", "iOS17", "iOS18"] | None = None
    layout: Literal["app", "mlx"] = "app"
    overwrite: bool = False
    allow_failed_gates: bool = False
    image_size: int | None = None
    image_sizes: tuple[int, ...] = ()
    image_input: bool = False
    min_snr_db: float | None = None
    max_kl_nats: float | None = None
    min_agreement: float | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, OptionError)
        self._resolve_format()
        for name, allowed in (
            ("embed_bits", BITS),
            ("head_bits", BITS),
            ("projector_bits", BITS),
            ("dtype", DTYPES),
            ("encoder_precision", tuple(PRECISIONS)),
            ("deployment_target", TARGETS),
            ("layout", LAYOUTS),
            ("method", METHODS),
        ):
            value = getattr(self, name)
            if value not in allowed and not (value is None and name in _OPTIONAL):
                raise unknown(name, value, allowed)
        self._check_search()
        self._check_loader()
        self._check_encoder()
        self._check_sizes()
        for name in ("min_snr_db", "max_kl_nats", "min_agreement"):
            value = getattr(self, name)
            if value is not None and (value != value or value < 0):
                raise OptionError(f"--{name.replace('_', '-')} is {value}: expected zero or more")
        if self.min_agreement is not None and self.min_agreement > 1:
            raise OptionError(f"--min-agreement is {self.min_agreement}: expected a share up to 1")

    @property
    def calibrates(self) -> bool:
        """Whether anything looks at calibration data."""
        searched = self.llm_bpw is not None
        return searched or self.method != "rtn" or self.encoder_precision == "mixed"

    def _check_loader(self) -> None:
        """The layout's loaders know the forms that are asked for."""
        loader = LOADERS[self.layout]
        asked = {
            "--llm-bits" if self.llm_mode == "affine" else "--llm-mode": self.format,
            "--embed-bits": self.part_format(self.embed_bits or 16),
            "--head-bits": self.part_format(self.head_bits or 16),
            "--projector-bits": self.part_format(self.projector_bits),
        }
        for option, form in asked.items():
            if form is not None and not loader.knows(form):
                elsewhere = [name for name, other in LOADERS.items() if other.knows(form)]
                raise OptionError(
                    f"layout {self.layout} can't hold {form} ({option}): {loader.program} "
                    f"({loader.versions}) reads {loader.known()}, choose one of those, or --layout "
                    f"{' or '.join(elsewhere)}"
                )

    def _check_search(self) -> None:
        """A search decides every matrix's bits; calibration data is for it, or for a method."""
        if self.calibration is not None and not self.calibrates:
            raise OptionError(
                "--calibration is given and nothing looks at it: add --llm-bpw, a --method, or "
                "--encoder-precision mixed"
            )
        if self.llm_bpw is None:
            return
        if not 0 < self.llm_bpw < inf:
            raise OptionError(f"--llm-bpw is {self.llm_bpw}: expected bits per weight above zero")
        given = {
            "--recipe": self.recipe is not None,
            "--embed-bits": self.embed_bits is not None,
            "--head-bits": self.head_bits is not None,
            "--projector-bits": self.projector_bits != 16,
            "--llm-mode": self.llm_mode != "affine",
        }
        if any(given.values()):
            name = next(option for option, is_given in given.items() if is_given)
            raise OptionError(
                f"--llm-bpw is given with {name}, and a search decides every matrix's bits: leave "
                "one of them out"
            )

    def _resolve_format(self) -> None:
        """Put the mode's own numbers where none were given, and check those that were."""
        if self.llm_mode not in MODES:
            raise unknown("llm_mode", self.llm_mode, tuple(MODES))
        bits, groups = MODES[self.llm_mode]
        affine = self.llm_mode == "affine"
        own = DEFAULT_FORMAT if affine else Format(bits[0], groups[0], self.llm_mode)
        for name, default, allowed in (
            ("llm_bits", own.bits, (*bits, 16) if affine else bits),
            ("group_size", own.group_size, groups),
        ):
            value = getattr(self, name)
            if value not in (OWN, *allowed):
                raise unknown(name, value, allowed, "" if affine else f" with {self.llm_mode}")
            object.__setattr__(self, name, default if value == OWN else value)

    def _check_sizes(self) -> None:
        if not isinstance(self.image_sizes, list | tuple):
            raise OptionError(
                f"--image-sizes is {self.image_sizes!r}: expected a list of pixels, as [512, 1024]"
            )
        object.__setattr__(self, "image_sizes", tuple(self.image_sizes))
        if self.image_size is not None and self.image_sizes:
            raise OptionError(
                "--image-size and --image-sizes are both given: expected one of them, leave the "
                "other out"
            )
        option = "--image-sizes" if self.image_sizes else "--image-size"
        for size in self._sizes:
            if type(size) is not int or size <= 0 or size % IMAGE_SIZE_MULTIPLE:
                raise OptionError(
                    f"{option} is {size}: expected a multiple of {IMAGE_SIZE_MULTIPLE} pixels, the "
                    "encoder's stride"
                )
        if len({*self._sizes}) < len(self._sizes):
            raise OptionError(
                f"--image-sizes is {','.join(map(str, self._sizes))}: expected each size once, "
                "leave out what is there again"
            )

    def _check_encoder(self) -> None:
        if self.layout == "mlx":
            if self.image_input:
                raise OptionError(
                    "--image-input is for Core ML's encoder, and an mlx bundle has none: leave it "
                    "out"
                )
            if self.encoder_precision != "fp16":
                raise OptionError(
                    f"--encoder-precision {self.encoder_precision} is for Core ML's encoder, and "
                    "an mlx bundle's has the type of everything else: use --dtype float32"
                )
            if self.deployment_target is not None:
                raise OptionError(
                    "--deployment-target is for Core ML's encoder, and an mlx bundle has none: "
                    "leave it out"
                )
        bpw = self.encoder_bpw
        if bpw is not None and self.encoder_precision != "mixed":
            raise OptionError(
                f"--encoder-bpw is what mixed is given, and the encoder is {self.encoder_precision}"
                ": add --encoder-precision mixed, or leave it out"
            )
        if bpw is not None and not 4 <= bpw < 16:
            raise OptionError(f"--encoder-bpw is {bpw}: expected 4 bits or more, and less than 16")
        lowest, target = PRECISIONS[self.encoder_precision], self.deployment_target
        if target is not None and TARGETS.index(target) < TARGETS.index(lowest):
            raise OptionError(
                f"--deployment-target is {target}, which does not load {self.encoder_precision} "
                f"weights: expected {lowest} or later, or --encoder-precision fp16"
            )
        if target is not None and target != FUNCTIONS_TARGET and len(self.image_sizes) > 1:
            raise OptionError(
                f"--deployment-target is {target}, which loads one input size of an encoder: "
                f"expected {FUNCTIONS_TARGET}, or --image-size"
            )

    @property
    def target(self) -> str:
        """The first iOS that loads the encoder."""
        first = PRECISIONS[self.encoder_precision]
        if self.encoder_precision == "fp32":
            # Apple's own export is fp32, for iOS 16: the same package, then.
            first = "iOS16"
        if len(self.image_sizes) > 1:
            first = FUNCTIONS_TARGET
        return self.deployment_target or first

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.image_sizes or (() if self.image_size is None else (self.image_size,))

    @property
    def default_size(self) -> int | None:
        """The encoder's input in pixels: of several the one that the released encoder has and the
        demo app asks for, else the largest. None for the checkpoint's own."""
        return RELEASED_SIZE if RELEASED_SIZE in self._sizes else max(self._sizes, default=None)

    @property
    def other_sizes(self) -> tuple[int, ...]:
        """Of several, those besides the default, ascending."""
        return tuple(sorted({*self._sizes} - {self.default_size}))

    @property
    def encoder_bits(self) -> float:
        """Of an encoder's weight, in the mean."""
        if self.encoder_precision == "mixed":
            return self.encoder_bpw or DEFAULT_ENCODER_BPW
        return ENCODER_BITS[self.encoder_format]

    @property
    def compressed(self) -> bool:
        """Whether the encoder's weights are stored in fewer bits than they are computed with."""
        return self.encoder_format not in ENCODER_SNR_DB

    @property
    def format(self) -> Format | None:
        """The language model's, where nothing else is said of a part of it."""
        if self.llm_bits == 16:
            return None
        return Format(self.llm_bits, self.group_size, self.llm_mode)

    @property
    def affine_group_size(self) -> int:
        """Of the parts that are affine whatever the mode is."""
        return self.group_size if self.llm_mode == "affine" else DEFAULT_FORMAT.group_size

    def part_format(self, bits: int) -> Format | None:
        """Of a part with bits of its own."""
        return None if bits == 16 else Format(bits, self.affine_group_size)

    @property
    def encoder_format(self) -> str:
        """fp16, fp32, bf16 or what it is compressed to. In an `mlx` bundle the encoder has the type
        of everything else, because mlx-vlm's projector and language model compute in whatever it
        hands them."""
        return self.encoder_precision if self.layout == "app" else FORMATS[self.dtype]

    @property
    def snr_floor_db(self) -> float:
        floor = self.min_snr_db
        return (
            ENCODER_SNR_DB.get(self.encoder_format, COMPRESSED_SNR_DB) if floor is None else floor
        )

    @property
    def weights_floor_db(self) -> float:
        """Of each compressed weight's SNR, which k-means exceeds by some dB."""
        return WEIGHTS_SNR_DB[self.encoder_format]

    def resolved(self) -> dict[str, Any]:
        """The options as the manifest records them. The answers' limits are there where they were
        given: without, `verify.answer_gates` finds them."""
        data = asdict(self)
        data |= {
            "encoder_precision": self.encoder_format,
            "encoder_bpw": self.encoder_bits if self.encoder_precision == "mixed" else None,
            "deployment_target": self.target if self.layout == "app" else None,
            "min_snr_db": self.snr_floor_db,
        }
        if self.format is None:
            data["group_size"] = None
        del data["overwrite"]
        return data


def parse_sizes(text: str) -> tuple[int, ...]:
    """`512,1024` → (512, 1024).

    Raises:
        OptionError: not whole numbers with commas between them.
    """
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise OptionError(
            f"--image-sizes is {text!r}: expected pixels with commas between, such as 512,1024"
        ) from error


def unknown(name: str, value: Any, allowed: tuple[Any, ...], context: str = "") -> OptionError:
    """For raising: the option has none of the values that there are."""
    return OptionError(
        f"--{name.replace('_', '-')} is {value}{context}: expected one of "
        f"{', '.join(map(str, allowed))}"
    )
