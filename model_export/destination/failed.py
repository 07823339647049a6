"""A bundle that failed a gate is kept beside its destination, to be looked at."""

from __future__ import annotations

import os
from pathlib import Path

from fastvlm_mlx.bundle.manifest import MANIFEST
from fastvlm_mlx.bundle.schema import read_json
from fastvlm_mlx.errors import DestinationError
from model_export.destination.destination import appearing, check_replaceable, look_at

# Added to the destination's name.
FAILED_SUFFIX = ".failed-gates"


def keep_failed(directory: Path, destination: Path) -> Path:
    """Move a whole bundle from `directory` to a place beside the destination, where it replaces
    one that failed before.

    Returns:
        The place.
    """
    kept = destination.with_name(destination.name + FAILED_SUFFIX)
    number = 1
    while os.path.lexists(kept) and not _failed_before(kept):
        number += 1
        kept = destination.with_name(f"{destination.name}{FAILED_SUFFIX}-{number}")
    with appearing(look_at(kept)) as place:
        for path in directory.iterdir():
            path.rename(place / path.name)
    return kept


def _failed_before(path: Path) -> bool:
    try:
        check_replaceable(path, overwrite=True)
        manifest = read_json(path, path / MANIFEST, DestinationError, remedy="")
    except DestinationError:
        return False
    return manifest.get("gates_passed") is False
