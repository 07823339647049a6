"""What can be said of a command line before torch is imported, which takes seconds.

The steps of the work look at all of this themselves; here a mistake is told at once.
"""

from __future__ import annotations

from pathlib import Path

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.kind import is_bundle
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.hub import is_elsewhere
from model_export.destination.destination import check_replaceable, resolve
from model_export.language import recipes
from model_export.options import ExportOptions
from model_export.samples.calibration import check_path


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Raises DestinationError: something is there that may not be replaced."""
    check_replaceable(resolve(out), overwrite=overwrite)


def check_samples(name: str, path: str | Path | None) -> None:
    """Raises OptionError: there are no images at the path that the option `name` gives."""
    if path is not None:
        check_path(name, path)


def check_checkpoint(
    reference: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    image_size: int | None = None,
) -> Checkpoint | None:
    """Open a checkpoint, unless it is on the hub: then the result is None.

    Raises:
        CheckpointError, ConfigError, OptionError: as `Checkpoint`.
    """
    elsewhere = [name for name in (reference, base) if name is not None and is_elsewhere(name)]
    # A path that exists wins over a hub id.
    if not all(_exists(name) for name in elsewhere):
        return None
    return Checkpoint(reference, base=base, revision=revision, image_size=image_size)


def check_export(
    reference: str,
    out: Path,
    options: ExportOptions,
    *,
    base: str | None = None,
    revision: str | None = None,
) -> None:
    """Look at the destination, at what the options name, and at a checkpoint that is here.

    Raises:
        DestinationError: something is at `out` that may not be replaced.
        CheckpointError, ConfigError: there is no whole checkpoint.
        OptionError: the options don't fit it.
    """
    check_destination(out, overwrite=options.destination.overwrite)
    check_samples("--calibration", options.calibration)
    size = options.encoder.default_size
    checkpoint = check_checkpoint(reference, base=base, revision=revision, image_size=size)
    if checkpoint is not None and options.llm.bpw is None:
        recipes.scheme(
            checkpoint.llm_specs, checkpoint.config, options.llm, options.destination.layout
        )


def check_model(reference: str) -> None:
    """Open a bundle or a checkpoint, unless it is on the hub.

    Raises:
        BundleError, CheckpointError, ConfigError: it is neither.
    """
    if _exists(reference) and is_bundle(Path(reference).expanduser()):
        Bundle.open(reference)
    else:
        check_checkpoint(reference)


def _exists(name: str | Path) -> bool:
    try:
        return Path(name).expanduser().exists()
    # A NUL in it, a home that nobody has, or a name that is too long.
    except (OSError, ValueError, RuntimeError):
        return False
