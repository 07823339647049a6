"""The programs that load a bundle of each layout: versions, and the quantized forms they know.

What an export may be asked for and what a layout's rules accept both follow from this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastvlm_mlx.bundle.quantization import Format

AFFINE_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Loader:
    """What reads a bundle.

    Attributes:
        program: by name.
        versions: that its rules are written from and hold for.
        forms: by mode the bits and the group sizes that it has.
        per_module: whether config.json can give a module a form of its own.
    """

    program: str
    versions: str
    forms: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    per_module: bool

    def knows(self, form: Format) -> bool:
        bits, groups = self.forms.get(form.mode, ((), ()))
        return form.bits in bits and form.group_size in groups

    def known(self) -> str:
        """The forms in words."""
        return "; ".join(
            f"{mode} with {_or(bits)} bits in groups of {_or(groups)}"
            for mode, (bits, groups) in self.forms.items()
        )


def _or(numbers: tuple[int, ...]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


LOADERS: Mapping[str, Loader] = {
    # MLX has 5 bits since 0.26, and the app builds with no later mlx-swift-examples than 2.21.2.
    "app": Loader(
        "the demo app",
        "mlx-swift 0.21.2 and 0.21.3, mlx-swift-examples 2.21.2",
        {"affine": ((2, 3, 4, 6, 8), AFFINE_GROUPS)},
        per_module=False,
    ),
    "mlx": Loader(
        "mlx-vlm and mlx-swift-lm",
        "mlx-vlm 0.7.10 with MLX 0.32, mlx-swift-lm 0c92cf070e48",
        {
            "affine": ((2, 3, 4, 5, 6, 8), AFFINE_GROUPS),
            "mxfp4": ((4,), (32,)),
            "mxfp8": ((8,), (32,)),
            "nvfp4": ((4,), (16,)),
        },
        per_module=True,
    ),
}
