"""Say whether the demo app's Xcode project builds with its Swift packages, and pin their versions.

The project asks for three packages "up to the next major version", gets newer ones than it was
written for, and does not compile. It compiles with the exact versions of `BUILDS_WITH`
(apple/ml-fastvlm, issue 39). Its file `project.pbxproj` is a property list in the old format. Only
the requirements of these packages are ever changed in it; all else is kept byte for byte.

Xcode writes the versions that it chose into `Package.resolved`. It keeps a version there as long as
the requirement allows it, and chooses anew otherwise. Where that is forbidden
(`-disableAutomaticPackageResolution`, Xcode Cloud), the build fails.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import unified_diff
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.files import read_bytes
from fastvlm_mlx.bundle.schema import read_json
from fastvlm_mlx.errors import DestinationError
from model_export.layouts import plist

BUILDS_WITH = {
    "ml-explore/mlx-swift-examples": "2.21.2",
    "ml-explore/mlx-swift": "0.21.3",
    "huggingface/swift-transformers": "0.1.19",
}
PROJECT = "FastVLM.xcodeproj"
PBXPROJ = "project.pbxproj"
RESOLVED = "project.xcworkspace/xcshareddata/swiftpm/Package.resolved"
# The name under which the file is kept as it was before it was pinned.
KEPT = f"{PBXPROJ}.before-pin"
_REPOSITORY = re.compile(r"[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?$")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True)
class Requirement:
    """The versions of one package that a project asks for.

    Attributes:
        repository: `owner/name`, in lower case.
        kind: `upToNextMajorVersion`, `exactVersion` and so on.
        span: where its braces begin and end in the project's text.
    """

    repository: str
    kind: str
    fields: dict[str, str]
    span: tuple[int, int]

    @property
    def name(self) -> str:
        return self.repository.partition("/")[2]

    @property
    def exact(self) -> str | None:
        return self.fields.get("version") if self.kind == "exactVersion" else None

    def allows(self, version: str) -> bool:
        """Whether the package may be resolved to that version."""
        if self.exact is not None:
            return self.exact == version
        least, most = _numbers(self.fields.get("minimumVersion")), _numbers(version)
        if not least or not most:
            return False
        ends = {
            "upToNextMajorVersion": (least[0] + 1, 0, 0),
            "upToNextMinorVersion": (least[0], least[1] + 1, 0),
            "versionRange": _numbers(self.fields.get("maximumVersion")),
        }
        end = ends.get(self.kind)
        return bool(end) and least <= most < (end or ())

    def __str__(self) -> str:
        """As "mlx-swift up to the next major version from 0.21.2"."""
        words = {
            "upToNextMajorVersion": "up to the next major version from {minimumVersion}",
            "upToNextMinorVersion": "up to the next minor version from {minimumVersion}",
            "versionRange": "from {minimumVersion} to before {maximumVersion}",
            "exactVersion": "exactly {version}",
            "revision": "at commit {revision}",
            "branch": "of branch {branch}",
        }
        with suppress(KeyError):
            return f"{self.name} {words[self.kind].format(**self.fields)}"
        return f"{self.name} by a requirement of kind {self.kind}"


@dataclass(frozen=True)
class Project:
    """A project's file as it is now.

    Attributes:
        text: its whole text; bytes that are no UTF-8 are kept in it.
        requirements: what is asked of each package, by its repository.
        resolved: the versions in `Package.resolved`, by repository.
    """

    file: Path
    text: str
    requirements: dict[str, Requirement]
    resolved: dict[str, str]

    @property
    def pinned(self) -> bool:
        return all(self.exactly(name, version) for name, version in BUILDS_WITH.items())

    @property
    def pinnable(self) -> bool:
        """Whether it asks for the released app's packages, and allows the versions that build."""
        asked = self.requirements
        return all(r in asked and asked[r].allows(v) for r, v in BUILDS_WITH.items())

    def verdict(self) -> str:
        """Say in a sentence whether the project builds with what it asks for, and what to do."""
        versions = ", ".join(f"{r.partition('/')[2]} {v}" for r, v in BUILDS_WITH.items())
        if self.pinned:
            text = f"it builds: the project asks for exactly {versions}"
            stale = {r: v for r, v in self.resolved.items() if BUILDS_WITH.get(r, v) != v}
            if not stale:
                return text
            others = ", ".join(f"{r.partition('/')[2]} {v}" for r, v in stale.items())
            return (
                f"{text}; {PROJECT}/{RESOLVED} still has {others}, which Xcode resolves anew when "
                "it opens the project: remove that file where it may not (xcodebuild "
                "-disableAutomaticPackageResolution, Xcode Cloud)"
            )
        if not self.pinnable:
            asked = "; ".join(map(str, self.requirements.values())) or "no Swift package at all"
            return (
                f"whether it builds is not known: the released app builds with {versions}, and "
                f"this project asks for something else ({asked}), which is left as it is"
            )
        if all(self._gets(name, version) for name, version in BUILDS_WITH.items()):
            return (
                f"it builds as long as {PROJECT}/{RESOLVED} holds {versions}: --pin-packages makes "
                "the project itself ask for them"
            )
        loose = [r for r, v in BUILDS_WITH.items() if not self.exactly(r, v)]
        asked = ", ".join(str(self.requirements[repository]) for repository in loose)
        return (
            f"it does not build: the project asks for {asked}, and newer versions do "
            f"not compile with the app; --pin-packages makes it {versions}"
        )

    def block(self, repository: str) -> str:
        """The requirement of a package, as it is written in the file."""
        return self.text[slice(*self.requirements[repository].span)]

    def exactly(self, repository: str, version: str) -> bool:
        asked = self.requirements.get(repository)
        return asked is not None and asked.exact == version

    def _gets(self, repository: str, version: str) -> bool:
        return self.exactly(repository, version) or self.resolved.get(repository) == version


def read_project(model: Path) -> Project:
    """Read the project that belongs to the app's model directory, `app/FastVLM/model`.

    Raises:
        DestinationError: there is none, or it is not as Xcode writes one.
    """
    folder = model.parent.parent / PROJECT
    file = folder / PBXPROJ
    if not file.is_file():
        raise DestinationError(
            f"{file} does not exist, so nothing is known of its Swift packages: expected the app/ "
            "directory of a clone of apple/ml-fastvlm"
        )
    return replace(_project(file), file=file.resolve(), resolved=_resolved(folder / RESOLVED))


def pinned(project: Project) -> str:
    """Make the project's text with the exact versions. It stays as it is where it asks for them
    already, or where the project asks for something else."""
    if not project.pinnable:
        return project.text
    asked = project.requirements
    changes = {r: v for r, v in BUILDS_WITH.items() if asked[r].exact != v}
    return _replaced(project, {r: _exactly(project.block(r), v) for r, v in changes.items()})


def unpinned(project: Project) -> str:
    """Make the project's text with the requirements that it had before it was pinned. What else has
    changed since stays, such as the team that Xcode has written into it.

    Raises:
        DestinationError: there is nothing to undo.
    """
    kept = project.file.with_name(KEPT)
    if not kept.is_file():
        raise DestinationError(
            f"{project.file} was not pinned by --pin-packages, there is no {KEPT} beside it: "
            "nothing to undo"
        )
    before = _project(kept)
    ours = [r for r, v in BUILDS_WITH.items() if project.exactly(r, v) and r in before.requirements]
    return _replaced(project, {repository: before.block(repository) for repository in ours})


def pin(project: Project) -> None:
    """Write the exact versions and keep the old file beside the new one. Where nothing changes,
    nothing is written.

    Raises:
        DestinationError: it can't be written.
    """
    text, kept = pinned(project), project.file.with_name(KEPT)
    if text != project.text:
        if os.path.lexists(kept):
            raise DestinationError(
                f"{kept} is there already, from an earlier --pin-packages or of your own: undo it "
                "with --unpin-packages first, or move the file away"
            )
        if _project(project.file).text != project.text:
            raise DestinationError(
                f"{project.file} was saved by another program just now: close Xcode, and run the "
                "same command again"
            )
        with _written(project.file):
            _write(kept, project.text, like=project.file)
            _write(project.file, text, like=project.file)


def unpin(project: Project) -> None:
    """Undo `pin`, and remove the old file that it kept.

    Raises:
        DestinationError: there is nothing to undo, or it can't be written.
    """
    text = unpinned(project)
    with _written(project.file):
        _write(project.file, text, like=project.file)
        project.file.with_name(KEPT).unlink()


def diff(project: Project, text: str) -> str:
    """Show what would change as `diff -u` does, in characters that are safe to print."""
    old, new = (part.splitlines(keepends=True) for part in (project.text, text))
    lines = unified_diff(old, new, f"{PROJECT}/{PBXPROJ}", f"{PROJECT}/{PBXPROJ}")
    shown = (c if c.isprintable() or c in "\t\n" else ascii(c)[1:-1] for c in "".join(lines))
    return "".join(shown)


def _project(file: Path) -> Project:
    text = read_bytes(None, file, DestinationError).decode("utf-8", "surrogateescape")
    return Project(file, text, _requirements(file, text), {})


def _replaced(project: Project, blocks: dict[str, str]) -> str:
    """Replace the requirements of some packages in the project's text."""
    text = project.text
    spans = {repository: project.requirements[repository].span for repository in blocks}
    for repository, (start, end) in sorted(spans.items(), key=lambda item: -item[1][0]):
        text = text[:start] + blocks[repository] + text[end:]
    return text


def _exactly(old: str, version: str) -> str:
    """Write the requirement of one version, broken into lines as the old one is."""
    between = re.match(r"\{(\s*)", old)
    lead = between.group(1) if between else ""
    last = re.search(r"(\s*)\}$", old)
    tail = last.group(1) if last else ""
    return f"{{{lead}kind = exactVersion;{lead or ' '}version = {version};{tail}}}"


def _requirements(file: Path, text: str) -> dict[str, Requirement]:
    """Read what is asked of each package, by its repository.

    Raises:
        DestinationError: the text is no project of Xcode's.
    """
    try:
        objects = plist.parse(text).entries["objects"].entries
        requirements = {}
        for entry in objects.values():
            if entry.text_of("isa") == "XCRemoteSwiftPackageReference":
                required = entry.entries["requirement"]
                fields = {key: required.text_of(key) for key in required.entries}
                match = _REPOSITORY.search(entry.text_of("repositoryURL"))
                name = match.group(1).lower() if match else entry.text_of("repositoryURL")
                requirements[name] = Requirement(name, fields.pop("kind"), fields, required.span)
    except (KeyError, ValueError) as error:
        raise DestinationError(
            f"{file} can't be read as Xcode's ({error}): open it in Xcode, or check it out again"
        ) from error
    return requirements


def _resolved(file: Path) -> dict[str, str]:
    """Read the version of each package from any of Xcode's forms of `Package.resolved`, by
    repository. A file of another form has no versions, because Xcode then chooses anew."""
    if not file.is_file():
        return {}
    versions = {}
    with suppress(DestinationError, AttributeError, TypeError):
        data: Any = read_json(None, file, DestinationError, remedy="")
        pins = data["object"]["pins"] if "object" in data else data.get("pins", [])
        for entry in pins:
            url = entry.get("location") or entry.get("repositoryURL")
            match, version = _REPOSITORY.search(url), entry["state"].get("version")
            if match and isinstance(version, str):
                versions[match.group(1).lower()] = version
    return versions


def _numbers(version: str | None) -> tuple[int, ...]:
    # No part of a version has ten digits.
    match = _VERSION.fullmatch((version or "")[:30])
    return tuple(map(int, match.groups())) if match else ()


@contextmanager
def _written(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DestinationError(
            f"{file} can't be written ({error.strerror or error}): check its permissions and the "
            "room on its disk; it is as it was"
        ) from error


def _write(file: Path, text: str, *, like: Path) -> None:
    """Write a file whole or not at all, with the permissions of `like`. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with open(handle, "wb") as stream:
            stream.write(text.encode("utf-8", "surrogateescape"))
            stream.flush()
            os.fsync(stream.fileno())
        shutil.copymode(like, name)
        os.replace(name, file)
    except OSError:
        with suppress(OSError):
            os.unlink(name)
        raise
