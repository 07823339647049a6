"""Put an `app` bundle where the Xcode project of Apple's demo app expects its model.

The project of apple/ml-fastvlm takes whatever lies in `app/FastVLM/model` into the app, compiles
the `.mlpackage` into the class `fastvithd`, and reads the rest from the app's resources.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.files import is_litter
from fastvlm_mlx.errors import BundleError, DestinationError
from fastvlm_mlx.vision.package import app_misfit, describe
from model_export.destination.destination import Destination, appearing, look_at, resolve
from model_export.layouts.app import check_app

# A user may give the repository's root, app/ or app/FastVLM/. The landmark is a source file that is
# found at one of these places below it.
LANDMARK = "FastVLM.swift"
PLACES = ("app/FastVLM", "FastVLM", ".")


@dataclass(frozen=True)
class Installation:
    """An installation that was checked and can be made.

    Attributes:
        place: the app's model directory, and what is there now.
        files: the names of the bundle's files, relative to it.
        bytes: the size of all of them.
    """

    bundle: Path
    place: Destination
    files: tuple[str, ...]
    bytes: int

    @property
    def model(self) -> Path:
        return self.place.path

    @property
    def replaces(self) -> tuple[str, ...]:
        """The files that are there now, relative to `model`."""
        present = self.place.found.files if self.place.found else ()
        return tuple(name for name in present if not any(map(is_litter, name.split("/"))))


def plan(bundle_path: Path, app: Path) -> Installation:
    """Find the app's model directory and check that the unmodified app will load the bundle.

    Raises:
        BundleError: the bundle is broken, or the unmodified app would crash on it.
        DestinationError: `app` is not the demo app, or its model can't be replaced.
    """
    bundle = Bundle.open(bundle_path)
    if bundle.layout != "app":
        raise BundleError(
            f"{bundle_path} is of layout {bundle.layout} and the demo app loads layout app: make "
            f"such a bundle with `fastvlm convert {bundle_path} OUT`"
        )
    bundle.check_files()
    info = describe(bundle.package)
    check_app(bundle, info)
    misfit = app_misfit(info)
    if misfit is not None:
        raise BundleError(
            f"{bundle_path} does not fit the unmodified app, {misfit}: export a checkpoint of the "
            "released encoder at 1024×1024, without --image-input"
        )
    place = look_at(model_directory(app))
    if place.found is not None and not place.found.is_directory:
        raise DestinationError(
            f"{place.path} is a file: expected the app's model directory, or nothing; remove it"
        )
    return Installation(
        bundle.path,
        place,
        tuple(bundle.files),
        sum((bundle.path / name).stat().st_size for name in bundle.files),
    )


def install(installation: Installation) -> None:
    """Copy the bundle beside the app's model directory, then put it in its place.

    What was there stays until the copy is complete. If it is no longer what the plan listed, it is
    not replaced.

    Raises:
        DestinationError: the directory can't be written, the disk is full, or what is there is not
            what the plan listed.
    """
    with appearing(installation.place) as directory:
        for name in installation.files:
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(installation.bundle / name, target)


def model_directory(app: Path) -> Path:
    """Find the directory where the app's model is, or will be.

    Raises:
        DestinationError: `app` is not the demo app.
    """
    app = app.expanduser()
    if not app.is_dir():
        raise DestinationError(
            f"{app} is not a directory: give the app/ directory of a clone of apple/ml-fastvlm"
        )
    for place in PLACES:
        if (app / place / LANDMARK).is_file():
            return resolve((app / place).resolve() / "model")
    raise DestinationError(
        f"{app} is not the demo app, it holds no FastVLM/{LANDMARK}: give the app/ directory of a "
        "clone of apple/ml-fastvlm"
    )
