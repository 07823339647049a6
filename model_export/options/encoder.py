"""What the vision encoder is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastvlm_mlx.errors import OptionError
from model_export.options.checks import check_choice, check_types

# Each precision with the first system that loads it. Table look-ups and 8-bit weights came with
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
# Bits of a weight; `mixed` has as many as it is given.
PRECISION_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "palette6": 6, "palette4": 4}
PALETTE_BITS = {"palette4": 4, "palette6": 6, "palette8": 8}
# Floors of each compressed weight's SNR in dB, which k-means exceeds by some dB.
WEIGHTS_SNR_DB = {"int8": 30.0, "palette6": 20.0, "palette4": 10.0, "mixed": 5.0}
IMAGE_SIZE_MULTIPLE = 64
RELEASED_SIZE = 1024
# The command line's names of the fields that are called otherwise there.
FLAT_NAMES = {"precision": "encoder_precision", "bpw": "encoder_bpw"}


@dataclass(frozen=True)
class EncoderOptions:
    """What the vision encoder is asked for.

    Attributes:
        precision: of Core ML's encoder. fp32 and fp16 are stored as they are computed; int8,
            palette6, palette4 and mixed are stored in fewer bits and computed in fp16. An encoder
            of layout mlx has the `dtype` of the language model instead.
        bpw: bits per weight that `mixed` may spend; 6 unless given.
        deployment_target: the first iOS that loads the encoder. Unless given, the first possible;
            for fp32 iOS 16, as in Apple's own export.
        image_size: the encoder's input in pixels; the checkpoint's own unless given.
        image_sizes: several input sizes in one encoder, which share the weights.
        image_input: Core ML's encoder takes 8-bit RGB images instead of float32 arrays.
    """

    precision: Literal["fp16", "fp32", "int8", "palette6", "palette4", "mixed"] = "fp16"
    bpw: float | None = None
    deployment_target: Literal["iOS15", "iOS16", "iOS17", "iOS18"] | None = None
    image_size: int | None = None
    image_sizes: tuple[int, ...] = ()
    image_input: bool = False

    def __post_init__(self) -> None:
        check_types(self, FLAT_NAMES)
        check_choice("encoder_precision", self.precision, tuple(PRECISIONS))
        if self.deployment_target is not None:
            check_choice("deployment_target", self.deployment_target, TARGETS)
        self._check_bpw()
        self._check_sizes()
        self._check_target()

    @property
    def compressed(self) -> bool:
        """Whether the weights are stored in fewer bits than they are computed with."""
        return self.precision not in ("fp16", "fp32")

    @property
    def bits_per_weight(self) -> float:
        """The mean over the weights, in bits."""
        if self.precision == "mixed":
            return self.bpw or DEFAULT_ENCODER_BPW
        return PRECISION_BITS[self.precision]

    @property
    def target(self) -> str:
        """The first iOS that loads the encoder."""
        first = PRECISIONS[self.precision]
        if self.precision == "fp32":
            # Apple's own export is fp32, for iOS 16: the same package, then.
            first = "iOS16"
        if len(self.image_sizes) > 1:
            first = FUNCTIONS_TARGET
        return self.deployment_target or first

    @property
    def default_size(self) -> int | None:
        """The input size in pixels that runs unless another is asked for; None stands for the
        checkpoint's own. Of several sizes it is the one that the released encoder has and the demo
        app asks for, else the largest."""
        return RELEASED_SIZE if RELEASED_SIZE in self._sizes else max(self._sizes, default=None)

    @property
    def other_sizes(self) -> tuple[int, ...]:
        """The sizes besides the default one, ascending."""
        return tuple(sorted({*self._sizes} - {self.default_size}))

    @property
    def weights_floor_db(self) -> float:
        """The SNR that each compressed weight must reach."""
        return WEIGHTS_SNR_DB[self.precision]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.image_sizes or (() if self.image_size is None else (self.image_size,))

    def _check_bpw(self) -> None:
        if self.bpw is None:
            return
        if self.precision != "mixed":
            raise OptionError(
                f"--encoder-bpw is given and the encoder is {self.precision}: add "
                "--encoder-precision mixed, or leave it out"
            )
        if not 4 <= self.bpw < 16:
            raise OptionError(
                f"--encoder-bpw is {self.bpw}: expected 4 bits or more, and less than 16"
            )

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
                    f"{option} is {size}: expected {IMAGE_SIZE_MULTIPLE} pixels or a larger "
                    f"multiple of {IMAGE_SIZE_MULTIPLE}, the encoder's stride"
                )
        if len({*self._sizes}) < len(self._sizes):
            raise OptionError(
                f"--image-sizes is {','.join(map(str, self._sizes))}: expected each size once, "
                "leave out what is there again"
            )

    def _check_target(self) -> None:
        first, target = PRECISIONS[self.precision], self.deployment_target
        if target is None:
            return
        if TARGETS.index(target) < TARGETS.index(first):
            raise OptionError(
                f"--deployment-target is {target}, which does not load {self.precision} weights: "
                f"expected {first} or later, or --encoder-precision fp16"
            )
        if target != FUNCTIONS_TARGET and len(self.image_sizes) > 1:
            raise OptionError(
                f"--deployment-target is {target}, which loads one input size of an encoder: "
                f"expected {FUNCTIONS_TARGET}, or --image-size"
            )


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
