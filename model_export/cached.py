"""A checkpoint where a bundle is expected: exported once into the user's cache, then reused."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.bundle.manifest import SCHEMA_VERSION
from fastvlm_mlx.errors import CheckpointError, GateError, OptionError, printable
from fastvlm_mlx.extras import install, missing
from fastvlm_mlx.machine import tell
from fastvlm_mlx.models import archive, cache
from fastvlm_mlx.models.names import BUNDLE
from fastvlm_mlx.models.resolve import Found, latest
from fastvlm_mlx.models.resolve import resolve as resolve_with
from model_export.checkpoint.identity import identity
from model_export.checkpoint.sources import open_source
from model_export.interruption import Progress
from model_export.options import ExportOptions

# Those of `fastvlm export` where no option is given.
DEFAULTS = ExportOptions()


def resolve(
    model: str | Path, progress: Progress | None = None, *, options: ExportOptions = DEFAULTS
) -> Path:
    """The directory of the bundle that `model` stands for, to be loaded.

    A bundle on the hub, and what Apple published as an archive, are downloaded into the user's
    cache. A checkpoint is exported into it, once for what it holds, the options and this release.

    Args:
        model: the directory of a bundle or a checkpoint, a hub id of either, with an optional
            `@revision`, or the name of a published model. What exists here wins over a hub id.
        progress: called with each stage's name and, where it is known, the share that is done.
        options: those of the export.

    Raises:
        BundleError: there is neither a bundle nor a checkpoint.
        CheckpointError, ConfigError: it can't be downloaded, or is not a whole FastVLM.
        OptionError: a checkpoint has to be exported, and the `export` extra is missing.
        GateError: the export failed its check; the bundle is not kept.
        DestinationError: the disk is full, or the cache can't be written.
    """
    return resolve_with(model, partial(_exported, options=options, progress=progress))


def _exported(found: Found, *, options: ExportOptions, progress: Progress | None) -> Path:
    made_with = {"options": options.to_record(), "version": __version__, "schema": SCHEMA_VERSION}
    recipe = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
    if found.hub_id and found.repository is None:
        # The hub can't be reached.
        path = latest(found.hub_id, found.revision, recipe)
        if path is not None:
            return path
    reference, decided = _source(found)
    called = found.published.archive if found.published else None
    name = found.hub_id or found.name
    key = cache.Key(name, {"source": decided, **made_with}, called or "")
    if entry := cache.find(key):
        return entry.path
    _check_extra(found.name)
    planned = cache.Entry(
        name,
        BUNDLE,
        f"exported from {_origin(found)} by fastvlm-mlx {__version__}",
        "",
        0,
        0.0,
        reference=found.hub_id,
        revision=found.revision,
        commit=str(decided["hub"]).rpartition("@")[2] if "hub" in decided else None,
        made_with=recipe,
    )

    def make(target: Path, partial: Path) -> None:
        from model_export.pipeline import export

        # Its own download has an entry of its own.
        source = archive.entry(found.published).path if found.published else reference
        shown = printable(found.name)
        tell(
            f"{shown} is a checkpoint: it is exported once, as `fastvlm export` does without "
            f"options; for a choice of your own run `fastvlm export {shown} OUT --preset phone`"
        )
        try:
            result = export(source, target, options, progress)
        except GateError as error:
            raise GateError(
                f"{found.name} was exported and failed its check ({error.failed}), so the bundle "
                f"is not kept: export it yourself with more bits, `fastvlm export {found.name} OUT "
                "--preset exact`, or as it is with --allow-failed-gates",
                error.failed,
            ) from error
        if found.path is not None and identity(open_source(found.path)) != decided:
            raise CheckpointError(
                f"{found.name} changed while it was exported: run the same command again"
            )
        for note in result.notes:
            tell(note)

    waiting = f"another process exports {found.name}; waiting for it, Ctrl-C ends that"
    entry = cache.obtain(key, planned, make, waiting=waiting)
    cache.announce(entry)
    return entry.path


def _source(found: Found) -> tuple[str | Path, Any]:
    """What an export reads, and what tells it from other checkpoints."""
    if found.path is not None:
        return found.path, identity(open_source(found.path))
    if found.published is not None:
        return found.name, found.identity
    at = found.repository.commit if found.repository else found.revision
    reference = f"{found.hub_id}@{at}" if at else str(found.hub_id)
    if found.identity is not None:
        return reference, found.identity
    # Before gigabytes are fetched for nothing.
    _check_extra(found.name)
    source = open_source(reference)
    return source.hub_id or reference, identity(source)


def _origin(found: Found) -> str:
    if found.published is not None:
        return found.published.origin
    return f"{found.hub_id} on the hub" if found.hub_id else found.name


def _check_extra(name: str) -> None:
    if absent := missing("export"):
        raise OptionError(
            f"{name} is a checkpoint, and exporting it needs {', '.join(absent)} of the `export` "
            f"extra, which is not installed: run {install('export')}, or give a bundle"
        )
