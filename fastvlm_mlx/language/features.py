"""The features of an image, and the check that they belong to the model that is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.language.generate import Timings

if TYPE_CHECKING:
    from fastvlm_mlx.language.model import RunningModel


@dataclass(frozen=True)
class ImageFeatures:
    """An image as the language model reads it, reusable for any number of prompts.

    Made by `FastVLM.encode` and `FastVLM.project`; any model takes it whose projector has the same
    weights and which has images of the same size, as that of the same bundle loaded again.

    Attributes:
        features: the encoder's output, float32 [1, N, C]; with tiles [5, N, C].
        projected: the projector's, [N, D] in the model's dtype; with tiles [5 · N, D].
        timings: what preprocessing, encoding and projecting took.
        model: the fingerprint of the model that made it, and of the size of the image.
    """

    features: np.ndarray = field(repr=False)
    projected: mx.array = field(repr=False)
    timings: Timings
    model: str = ""

    @property
    def num_tokens(self) -> int:
        """How many placeholders it stands for; of features that were changed any number."""
        shape = getattr(self.projected, "shape", ())
        return int(shape[0]) if shape else 0


def fingerprint(model: RunningModel) -> str:
    """Of what decides which features suit a model, whatever their size: its projector."""
    digest = hashlib.blake2b(digest_size=16)
    arrays = dict(tree_flatten(model.multi_modal_projector.parameters()))
    for name, array in sorted(arrays.items()):
        digest.update(f" {name} {array.dtype} {array.shape} ".encode())
        digest.update(np.asarray(array.view(mx.uint8)).data)
    return digest.hexdigest()


def check_features(features: Any, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Hold features to a model.

    Args:
        shapes: of what is projected, by the fingerprints that the model's features may have.

    Raises:
        OptionError: they are another model's, or were changed.
    """
    if not isinstance(features, ImageFeatures) or not features.model:
        raise OptionError(
            "the image's features were put together by hand: expected what `encode` or `project` "
            "of this model returns"
        )
    if features.model not in shapes:
        raise OptionError(
            "the image's features are another model's, or of another image size: encode the "
            "image with the model that is asked"
        )
    projected = features.projected
    try:
        mx.eval(projected)
    except (RuntimeError, ValueError, TypeError) as error:
        # Computed lazily, in another thread.
        raise OptionError(
            f"the image's features can't be evaluated here ({error}): evaluate them in the "
            "thread "
            "that computes them"
        ) from error
    if (
        not isinstance(projected, mx.array)
        or projected.shape != shapes[features.model]
        or not mx.issubdtype(projected.dtype, mx.floating)
    ):
        raise OptionError(
            "the image's features were changed: expected an MLX array of floating-point numbers "
            f"of shape {list(shapes[features.model])}"
        )


def check_encoded(features: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """An encoder's output as float32.

    Raises:
        OptionError: an array of another type or shape, or values that are no numbers.
    """
    if not isinstance(features, np.ndarray) or features.dtype.kind != "f":
        kind = getattr(features, "dtype", type(features).__name__)
        raise OptionError(f"the encoder's output is of type {kind}: expected an array of float32")
    if features.shape != shape:
        raise OptionError(
            f"the encoder's output has shape {list(features.shape)}: expected {list(shape)}"
        )
    single = features.astype(np.float32)
    if not np.isfinite(single).all():
        raise OptionError("the encoder's output holds NaN or infinity: expected finite float32")
    return single


def pooled(features: ImageFeatures) -> np.ndarray:
    """The mean of the projected features, of length 1: float32 [D]."""
    mean = np.asarray(features.projected.astype(mx.float32)).mean(0)
    return mean / max(np.linalg.norm(mean), np.finfo(np.float32).tiny)


def copied(features: ImageFeatures) -> ImageFeatures:
    """Arrays of their own: whoever has an image's features may change them."""
    projected = mx.array(features.projected)
    mx.eval(projected)
    return replace(features, features=features.features.copy(), projected=projected)


def joined(each: Sequence[ImageFeatures]) -> ImageFeatures:
    """Those of an image's inputs, one after the other."""
    projected = mx.concatenate([one.projected for one in each])
    mx.eval(projected)
    return replace(
        each[0],
        features=np.concatenate([one.features for one in each]),
        projected=projected,
        timings=Timings.of_images(one.timings for one in each),
    )
