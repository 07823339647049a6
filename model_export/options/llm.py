"""What the language model and the projector are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvlm_mlx.bundle.quantization import MODES, Format
from fastvlm_mlx.errors import OptionError
from model_export.options.checks import check_choice, check_types

# What any layout can hold; what a layout's own loaders lack is refused where the layout is known.
BITS = (*MODES["affine"][0], 16)
GROUP_SIZES = MODES["affine"][1]
DEFAULT_FORMAT = Format(bits=8, group_size=64)
DTYPES = ("float16", "bfloat16", "float32")
FLOAT16_MAX = 65_504
METHODS = ("rtn", "awq", "gptq", "dwq")
# mlx_lm.convert's, by the names of its --quant-predicate.
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
# The command line's names of the fields that are called otherwise there.
FLAT_NAMES = {"bits": "llm_bits", "mode": "llm_mode", "bpw": "llm_bpw"}


@dataclass(frozen=True)
class LLMOptions:
    """What the language model and the projector are asked for. 16 bits mean not quantized: the
    weights are cast to `dtype` and left at that.

    Attributes:
        bits, group_size: of the matrices. Unless given they are the mode's own, which for affine
            are 8 bits in groups of 64.
        mode: affine, or a mode that has bits and a group size of its own.
        embed_bits, head_bits: of the embedding and of an untied head, where `bits` is not meant
            for them.
        projector_bits: of the projector's two matrices.
        recipe: a JSON file that says which layer gets which bits, the others having `bits`; or
            the name of one of mlx-lm's recipes, which decides the bits of every layer.
        bpw: bits per weight, with scales and all that is not quantized counted in; the best
            assignment of bits to matrices is searched for.
        method: how the weights are rounded. rtn rounds each to the nearest value; awq, gptq and
            dwq look at calibration images to lose less.
        dtype: of whatever is not quantized.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"
    embed_bits: int | None = None
    head_bits: int | None = None
    projector_bits: int = 16
    recipe: str | Path | None = None
    bpw: float | None = None
    method: Literal["rtn", "awq", "gptq", "dwq"] = "rtn"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.recipe, Path):
            object.__setattr__(self, "recipe", str(self.recipe))
        check_types(self, FLAT_NAMES)
        self._check_mode()
        for name, value in (("embed_bits", self.embed_bits), ("head_bits", self.head_bits)):
            if value is not None:
                check_choice(name, value, BITS)
        check_choice("projector_bits", self.projector_bits, BITS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("method", self.method, METHODS)
        self._check_recipe()
        self._check_search()

    @property
    def format(self) -> Format | None:
        """The form of every matrix of which nothing else is said; None where it stays as it is."""
        if self.bits == 16:
            return None
        own = self._mode_format
        return Format(self.bits or own.bits, self.group_size or own.group_size, self.mode)

    @property
    def affine_group_size(self) -> int:
        """The group size of the parts that are affine whatever the mode is."""
        affine = self.mode == "affine"
        return (affine and self.group_size) or DEFAULT_FORMAT.group_size

    @property
    def has_groups(self) -> bool:
        """Whether anything can be quantized, and so has a group size."""
        parts = (self.embed_bits, self.head_bits, self.projector_bits)
        quantized = self.format is not None or self.recipe is not None
        return quantized or any(self.part_format(bits or 16) for bits in parts)

    def part_format(self, bits: int) -> Format | None:
        """The form of a part that has bits of its own."""
        return None if bits == 16 else Format(bits, self.affine_group_size)

    @property
    def bits_decided(self) -> bool:
        """Whether a search or a recipe by name decides the bits of every matrix."""
        return self.bpw is not None or self.recipe in RECIPES

    @property
    def resolved_bits(self) -> int:
        """The bits as they come to, the mode's own where none are given."""
        return self.bits or self._mode_format.bits

    @property
    def resolved_group_size(self) -> int:
        """The group size as it comes to, the mode's own where none is given."""
        return self.group_size or self._mode_format.group_size

    @property
    def _mode_format(self) -> Format:
        bits, groups = MODES[self.mode]
        return DEFAULT_FORMAT if self.mode == "affine" else Format(bits[0], groups[0], self.mode)

    def _check_mode(self) -> None:
        check_choice("llm_mode", self.mode, tuple(MODES))
        bits, groups = MODES[self.mode]
        affine = self.mode == "affine"
        context = "" if affine else f" with {self.mode}"
        if self.bits is not None:
            check_choice("llm_bits", self.bits, (*bits, 16) if affine else bits, context)
        if self.group_size is not None:
            check_choice("group_size", self.group_size, groups, context)

    def _check_recipe(self) -> None:
        """A recipe by name decides every matrix's bits, as it does in mlx-lm, and is affine."""
        if self.recipe not in RECIPES:
            return
        given = {"--llm-bits": self.bits is not None, "--llm-mode": self.mode != "affine"}
        for option, is_given in given.items():
            if is_given:
                raise OptionError(
                    f"--recipe {self.recipe} is given with {option}, and this recipe decides every "
                    "matrix's bits itself: leave one of them out"
                )

    def _check_search(self) -> None:
        """A search decides every matrix's bits."""
        if self.bpw is None:
            return
        if self.bpw <= 0:
            raise OptionError(f"--llm-bpw is {self.bpw}: expected bits per weight above zero")
        given = {
            "--llm-bits": self.bits is not None,
            "--recipe": self.recipe is not None,
            "--embed-bits": self.embed_bits is not None,
            "--head-bits": self.head_bits is not None,
            "--projector-bits": self.projector_bits != 16,
            "--llm-mode": self.mode != "affine",
        }
        if any(given.values()):
            name = next(option for option, is_given in given.items() if is_given)
            raise OptionError(
                f"--llm-bpw is given with {name}, and a search decides every matrix's bits: leave "
                "one of them out"
            )
