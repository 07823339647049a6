"""An environment of some distributions and no others, made of links to those installed here."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def closure(requirements: Iterable[Requirement]) -> list[Distribution]:
    """The installed distributions that the requirements bring, and all that those require."""
    wanted, found = list(requirements), {}
    while wanted:
        requirement = wanted.pop()
        # Of a marker that names an extra, "" is the one that nobody asked for.
        extras = ("", *requirement.extras)
        needed = requirement.marker
        if needed is not None and not any(needed.evaluate({"extra": e}) for e in extras):
            continue
        name = requirement.name.lower().replace("_", "-")
        if extras[1:] or name not in found:
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                continue
            for text in found[name].requires or ():
                inner = Requirement(text)
                marker = inner.marker
                if marker is None or any(marker.evaluate({"extra": e}) for e in extras):
                    inner.marker = None
                    wanted.append(inner)
    return list(found.values())


def link(distributions: Iterable[Distribution], directory: Path) -> None:
    """Put a link to every package and module of theirs into `directory`."""
    for found in distributions:
        for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            source = Path(str(found.locate_file(top)))
            if not (directory / top).exists() and source.exists() and top != "__pycache__":
                (directory / top).symlink_to(source)
