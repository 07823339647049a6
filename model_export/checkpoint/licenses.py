"""The licences of a checkpoint, which travel into every bundle made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fastvlm_mlx.bundle.files import read_bytes
from fastvlm_mlx.errors import CheckpointError

# Any text of a licence with room to spare, and names that no terminal or card is confused by.
LICENSE_BYTES = 1_000_000
LICENSE_NAME = re.compile(r"LICENSE[\w.-]{0,100}", re.ASCII)


def copy_licenses(sources: Sequence[Path], directory: Path) -> None:
    """Copy the licences of all `sources`, a fine-tune's directory and then its base's.

    Raises:
        CheckpointError: one is too large for a licence, or no plain file.
    """
    # The base's first, so that a fine-tune's own stands where both have one.
    for source in reversed(sources):
        for file in sorted(source.glob("LICENSE*")):
            if LICENSE_NAME.fullmatch(file.name):
                data = read_bytes(source, file, CheckpointError, LICENSE_BYTES)
                (directory / file.name).write_bytes(data)
