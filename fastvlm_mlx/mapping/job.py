"""What is asked about which images, and the asking: the same here and on a worker elsewhere."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.files import sha256
from fastvlm_mlx.errors import BundleError, ImageError
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.image.decode import DEFAULT_MAX_PIXELS, check_max_pixels
from fastvlm_mlx.language.batch import DEFAULT_BATCH_SIZE, check_batch_size
from fastvlm_mlx.language.sampling import SamplingOptions
from fastvlm_mlx.loading import load
from fastvlm_mlx.mapping import rows
from fastvlm_mlx.mapping.images import Shard, check_patterns, special
from fastvlm_mlx.mapping.rows import Row
from fastvlm_mlx.sizes import AUTO, check_detail

# Options that stand elsewhere among what a row depends on, or that no row shows.
_LATER = ("seed", "logprobs")


@dataclass(frozen=True)
class Job:
    """One question about the images of a folder, and the bundle that is to answer it.

    Attributes:
        bundle, folder: paths, which become absolute ones.
        options: how each answer is sampled.
        patterns: of the names of the images, such as `*.png`; none takes every name that images
            have.
        shard: the part of the images that is meant.
        batch_size: how many answers are decoded together.
        image_size, crop, max_pixels, compute_units, encoder_compute: as `fastvlm_mlx.load` takes
            them.
        detail: of each image, as `FastVLM.encode` takes it.

    Raises:
        OptionError: a value that is none of its option's.
        ImageError: no folder can have that path.
    """

    bundle: str | Path
    folder: str | Path
    prompt: str
    options: SamplingOptions = field(default_factory=SamplingOptions)
    patterns: tuple[str, ...] = ()
    shard: Shard = field(default_factory=Shard)
    batch_size: int = DEFAULT_BATCH_SIZE
    image_size: int | None = None
    crop: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS
    compute_units: str = "auto"
    encoder_compute: str = "auto"
    detail: str = AUTO

    def __post_init__(self) -> None:
        object.__setattr__(self, "bundle", os.path.abspath(self.bundle))
        object.__setattr__(self, "folder", _absolute(self.folder))
        object.__setattr__(self, "patterns", check_patterns(self.patterns))
        check_batch_size(self.batch_size)
        check_max_pixels(self.max_pixels)
        check_detail(self.detail)

    @property
    def structured(self) -> bool:
        """Whether the answers are JSON by a schema."""
        return self.options.json_schema is not None

    def load(self) -> FastVLM:
        """The model. Raises: as `fastvlm_mlx.load`."""
        return load(
            self.bundle,
            image_size=self.image_size,
            crop=self.crop,
            max_pixels=self.max_pixels,
            compute_units=self.compute_units,
            encoder_compute=self.encoder_compute,
            # No image comes twice.
            kept_bytes=0,
        )

    def made_of(self) -> dict[str, Any]:
        """What the answers depend on, by the names that people give them.

        Raises:
            BundleError, ConfigError: the bundle can't be opened.
        """
        bundle = Bundle.open(self.bundle)
        return {
            "folder": self.folder,
            "bundle": _fingerprint(bundle),
            "prompt": self.prompt,
            "image_size": self.image_size or bundle.config.vision.image_size,
            "detail": self.detail,
            "crop": self.crop,
            "encoder_compute": self.encoder_compute,
            **{key: value for key, value in asdict(self.options).items() if key not in _LATER},
            "seed": self.options.seed,
        }

    def answers(self, model: FastVLM, names: Iterable[str]) -> Iterator[Row]:
        """Ask about the images of those names, relative to the folder: a row for each as its answer
        ends. What is wrong with an image is in its row.

        Raises:
            PromptError, OptionError, EncoderError: what would be wrong with each image.
        """
        asked: dict[int, str] = {}
        refused: list[Row] = []
        results = model.batch(
            self._paths(names, asked, refused),
            self.prompt,
            self.options,
            batch_size=self.batch_size,
            detail=self.detail,
        )
        try:
            for index, result in results.completed():
                yield from _taken(refused)
                name = asked.pop(index)
                if isinstance(result, ImageError):
                    yield rows.failed(name, result, structured=self.structured)
                elif isinstance(result, Exception):
                    raise result
                else:
                    yield rows.answered(name, result, structured=self.structured)
            yield from _taken(refused)
        finally:
            results.close()

    def _paths(
        self, names: Iterable[str], asked: dict[int, str], refused: list[Row]
    ) -> Iterator[str]:
        index = 0
        for name in names:
            path = os.path.join(self.folder, name)
            kind = special(path)
            if kind is not None:
                error = ImageError(f"{path} is {kind}: expected a regular file")
                refused.append(rows.failed(name, error, structured=self.structured))
                continue
            asked[index] = name
            index += 1
            yield path


def _absolute(folder: str | Path) -> str:
    try:
        return os.path.abspath(Path(folder).expanduser())
    # The home of a user whom nobody knows.
    except RuntimeError as error:
        raise ImageError(f"{folder} can't be read ({error}): give a folder of images") from error


def _taken(refused: list[Row]) -> Iterator[Row]:
    while refused:
        yield refused.pop(0)


def _fingerprint(bundle: Bundle) -> str:
    """Of the files of a bundle: the manifest's hashes, or those that they have."""
    if bundle.manifest is not None:
        files = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    else:
        # Another fine-tune of the same model has files of the same sizes.
        try:
            files = {name: sha256(bundle.path / name) for name in bundle.stamps}
        except OSError as error:
            raise BundleError(
                f"{error.filename} can't be read ({error.strerror}): check its permissions"
            ) from error
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
