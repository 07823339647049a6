"""What a directory holds, a bundle or a checkpoint, told without reading more than headers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fastvlm_mlx.bundle.files import inside, left_behind
from fastvlm_mlx.bundle.manifest import MANIFEST
from fastvlm_mlx.errors import BundleError, printable

# How tensors of a bundle's language model begin, in either layout; a checkpoint's do not.
LANGUAGE = "language_model."
# Files that make a directory a checkpoint's where there is no whole model.
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# An owner and a name, as on the hub, and a revision.
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
# Of the files that either is made of.
_SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".mlpackage"})
_LISTED = 5


def is_bundle(path: Path) -> bool:
    """Whether a directory is a bundle, ours, Apple's, or mlx-vlm's, which has neither package nor
    manifest.

    A checkpoint stays one with a package in it, where Apple's exporter puts it.
    """
    if (path / MANIFEST).is_file():
        return True
    names = list(tensor_names(path))
    if names:
        return any(name.startswith(LANGUAGE) for name in names)
    return any(not left_behind(package.name) for package in path.glob("*.mlpackage"))


def is_checkpoint(path: Path) -> bool:
    """Whether a directory that is no bundle looks like a checkpoint's, whole or an adapter's."""
    return any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))


def is_neither(path: Path) -> bool:
    """Whether there is nothing at a directory that a bundle or a checkpoint, or a part of one, is
    made of, nor a directory of one."""
    try:
        suffixes = {child.suffix for child in path.iterdir() if not left_behind(child.name)}
    except OSError:
        # Who reads it says why it can't be read.
        return False
    return not suffixes & _SUFFIXES and what_is_below(path) is None


def what_is_below(path: Path) -> str | None:
    """The bundles and checkpoints that are directories of `path`, for a sentence; None if none are.

    It reads "the bundles a, b and the directories of 2 checkpoints (c, d)".
    """
    bundles: list[str] = []
    checkpoints: list[str] = []
    with suppress(OSError):
        for child in sorted(path.iterdir()):
            if not left_behind(child.name) and child.is_dir():
                if is_bundle(child):
                    bundles.append(child.name)
                elif is_checkpoint(child):
                    checkpoints.append(child.name)
    parts = []
    if bundles:
        parts.append(f"the bundle{'s' * (len(bundles) > 1)} {_listed(bundles)}")
    if len(checkpoints) > 1:
        parts.append(f"the directories of {len(checkpoints)} checkpoints ({_listed(checkpoints)})")
    elif checkpoints:
        parts.append(f"the checkpoint {_listed(checkpoints)}")
    return " and ".join(parts) or None


def is_like_a_hub_id(path: Path) -> bool:
    """Whether something that does not exist here may be a hub id, and is hardly a path misspelt."""
    return HUB_ID.fullmatch(str(path)) is not None and not path.parent.exists()


def tensor_names(path: Path) -> Iterator[str]:
    """Of every safetensors file right in a directory; a damaged one is told by who reads it."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(path.glob("*.safetensors")):
        if left_behind(file.name):
            continue
        with suppress(BundleError, SafetensorError, OSError):
            inside(path, file, BundleError)
            with safe_open(str(file), framework="numpy") as stream:
                yield from stream.keys()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(printable, names[:_LISTED])) + more
