"""What can be said of a command line before torch is imported, which takes seconds.

The steps of the work look at all of this themselves; here a mistake is told at once.
"""

from __future__ import annotations

from pathlib import Path

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.kind import is_bundle
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.hub import is_hub_id
from model_export.destination.destination import check_replaceable, resolve


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Raises DestinationError: something is there that may not be replaced."""
    check_replaceable(resolve(out), overwrite=overwrite)


def check_checkpoint(
    reference: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    image_size: int | None = None,
) -> None:
    """Open a checkpoint, unless it is on the hub.

    Raises:
        CheckpointError, ConfigError, OptionError: as `Checkpoint`.
    """
    hub_ids = [name for name in (reference, base) if name is not None and is_hub_id(name)]
    # A path that exists wins over a hub id.
    if all(_exists(name) for name in hub_ids):
        Checkpoint(reference, base=base, revision=revision, image_size=image_size)


def check_model(reference: str) -> None:
    """Open a bundle or a checkpoint, unless it is on the hub.

    Raises:
        BundleError, CheckpointError, ConfigError: it is neither.
    """
    if _exists(reference) and is_bundle(Path(reference).expanduser()):
        Bundle.open(reference)
    else:
        check_checkpoint(reference)


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    # A NUL in it, a home that nobody has, or a name that is too long.
    except (OSError, ValueError, RuntimeError):
        return False
