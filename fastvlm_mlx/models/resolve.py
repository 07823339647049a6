"""From what a user calls a model to the directory of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.files import is_url
from fastvlm_mlx.bundle.kind import (
    HUB_ID,
    is_bundle,
    is_checkpoint,
    is_neither,
    what_is_below,
)
from fastvlm_mlx.errors import BundleError, CheckpointError, HubUnreachableError
from fastvlm_mlx.machine import tell
from fastvlm_mlx.models import archive, cache, hub
from fastvlm_mlx.models.names import BUNDLE, Published, is_elsewhere, published


@dataclass(frozen=True)
class Found:
    """A checkpoint that a user asks for where a bundle is expected.

    Attributes:
        name: what the user calls it, a directory's as an absolute path.
        path: its directory, if it is one.
        published: if it is one of Apple's archives.
        repository: if it is on the hub, and the hub was reached.
        hub_id, revision: if it is on the hub.
    """

    name: str
    path: Path | None = None
    published: Published | None = None
    repository: hub.Repository | None = None
    hub_id: str | None = None
    revision: str | None = None

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """What decides the checkpoint, where that is known without reading it."""
        if self.published is not None:
            return {"archive": self.published.archive}
        if self.repository is not None and not self.repository.is_adapter:
            return {"hub": f"{self.repository.name}@{self.repository.commit}"}
        return None


Exporter = Callable[[Found], Path]


def refuse(found: Found) -> Path:
    """What is done with a checkpoint where nobody exports it."""
    raise CheckpointError(
        f"{found.name} is a checkpoint: expected a bundle, run it with `fastvlm generate "
        f"{found.name}`, which exports it once, or export it with `fastvlm export {found.name} OUT`"
    )


def resolve(model: str | Path, export: Exporter = refuse) -> Path:
    """The directory of the bundle that `model` stands for.

    Args:
        model: the directory of a bundle or a checkpoint, a hub id of either, with an optional
            `@revision`, or the name of a published model. What exists here wins over a hub id.
        export: makes a bundle of a checkpoint, or finds the one that was made before.

    Raises:
        BundleError: there is neither a bundle nor a checkpoint.
        CheckpointError: it can't be downloaded; or it is a checkpoint, and `export` refuses it.
        DestinationError: the disk is full, or the cache can't be written.
    """
    try:
        path = Path(model).expanduser()
        exists = path.exists()
    # A NUL in it, a home that nobody has, a name that is too long, or no path at all.
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no path"
        raise BundleError(f"{model!r} can't be opened as a path ({reason})") from error
    if exists:
        return _directory(path, export)
    if one := published(model):
        if one.hub is not None:
            return _on_hub(one.name, one.hub, None, export)
        return archive.entry(one).path if one.what == BUNDLE else export(Found(one.name, None, one))
    if is_url(model):
        raise BundleError(
            f"{model} is a URL: expected a model's directory, or a hub id such as "
            "apple/FastVLM-0.5B"
        )
    match = HUB_ID.fullmatch(str(model))
    if match is None or not is_elsewhere(model):
        raise BundleError(
            f"{model} does not exist: expected the directory of a bundle or a checkpoint, a hub id "
            "such as apple/FastVLM-0.5B, or a name that `fastvlm models` lists"
        )
    return _on_hub(str(model), match[1], match[2], export)


def _directory(path: Path, export: Exporter) -> Path:
    if not path.is_dir():
        raise BundleError(
            f"{path} is a file: expected the directory of a bundle or a checkpoint, or a hub id"
        )
    if is_bundle(path):
        return path
    if is_checkpoint(path) and not is_neither(path):
        return export(Found(str(path.resolve()), path=path))
    below = what_is_below(path)
    raise BundleError(
        f"{path} holds no config.json but {below}: give the one that is meant"
        if below
        else f"{path} holds no config.json: expected the directory of a bundle or a checkpoint"
    )


def _on_hub(name: str, hub_id: str, revision: str | None, export: Exporter) -> Path:
    try:
        repository = hub.look(hub_id, revision)
    except HubUnreachableError:
        if found := latest(hub_id, revision):
            return found
        return export(Found(name, hub_id=hub_id, revision=revision))
    if hub.holds_bundle(repository):
        return hub.bundle(repository).path
    return export(Found(name, None, None, repository, hub_id, revision))


def latest(hub_id: str, revision: str | None, made_with: str = "") -> Path | None:
    """The model of a hub id that was used last, which is told; None if none is in the cache."""
    entry = cache.latest(hub_id, revision, made_with)
    if entry is None:
        return None
    tell(
        f"the hub can't be reached: using {entry.name} as it is in the cache, commit {entry.commit}"
    )
    return entry.path
