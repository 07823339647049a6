"""Who loads the bundle, and what happens at its destination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from model_export.options.checks import check_choice, check_types
from model_export.options.loaders import LOADERS

LAYOUTS = tuple(LOADERS)
FLAT_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True)
class DestinationOptions:
    """Who loads the bundle, and what happens at its destination.

    Attributes:
        layout: app for Apple's demo app, with a Core ML encoder; mlx for mlx-vlm and mlx-swift-lm.
        overwrite: a bundle that is at the destination already is replaced.
        allow_failed_gates: a bundle that fails its check appears at the destination all the same,
            with the failure in its manifest.
    """

    layout: Literal["app", "mlx"] = "app"
    overwrite: bool = False
    allow_failed_gates: bool = False

    def __post_init__(self) -> None:
        check_types(self, FLAT_NAMES)
        check_choice("layout", self.layout, LAYOUTS)
