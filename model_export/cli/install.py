"""`fastvlm install`: the verb."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer._click.exceptions import MissingParameter

from fastvlm_mlx.cli.common import argument, option
from fastvlm_mlx.errors import DestinationError, OptionError, printable

if TYPE_CHECKING:
    from model_export.layouts.xcode import Project

PACKAGES, OTHER = "Swift packages", "Other options"
NEXT = (
    "Next: open FastVLM.xcodeproj beside it in Xcode, choose your team under Signing & "
    "Capabilities, a device, and run"
)


def install(
    call: typer.Context,
    bundle: Annotated[
        Path | None,
        argument("BUNDLE", "The directory of a bundle; not needed with --unpin-packages."),
    ] = None,
    app_dir: Annotated[
        Path | None,
        argument("APP", "The app/ directory of a clone of apple/ml-fastvlm."),
    ] = None,
    pin_packages: Annotated[
        bool,
        option(
            "Make the project ask for the versions of its Swift packages that it builds with.",
            "--pin-packages",
            group=PACKAGES,
        ),
    ] = False,
    unpin_packages: Annotated[
        bool,
        option(
            "Undo what --pin-packages changed, and copy nothing.",
            "--unpin-packages",
            group=PACKAGES,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        option("List what would be done, and do nothing.", "--dry-run", group=OTHER),
    ] = False,
) -> None:
    """The bundle takes the place of the model that the project has. It must be of layout app and
    have the input and output of the released encoder, or the app would crash on it."""
    if pin_packages and unpin_packages:
        raise OptionError("--pin-packages and --unpin-packages are both given: choose one")
    if unpin_packages:
        # The one path that is needed is the last of those given.
        _unpin(_given(call, "app_dir", app_dir or bundle), dry_run=dry_run)
    else:
        bundle = _given(call, "bundle", bundle)
        app_dir = _given(call, "app_dir", app_dir)
        _install(bundle, app_dir, pin_packages=pin_packages, dry_run=dry_run)


def _given(call: typer.Context, name: str, path: Path | None) -> Path:
    if path is None:
        param: Any = next(each for each in call.command.params if each.name == name)
        raise MissingParameter(ctx=call, param=param)
    return path


def _unpin(app_dir: Path, *, dry_run: bool) -> None:
    from model_export.layouts import xcode
    from model_export.layouts.install import model_directory

    project = xcode.read_project(model_directory(app_dir))
    _show(project, xcode.unpinned(project), dry_run=dry_run)
    if not dry_run:
        xcode.unpin(project)


def _install(bundle: Path, app_dir: Path, *, pin_packages: bool, dry_run: bool) -> None:
    from model_export.layouts import xcode
    from model_export.layouts.install import install as run
    from model_export.layouts.install import plan

    installation = plan(bundle, app_dir)
    try:
        project = xcode.read_project(installation.model)
    except DestinationError as error:
        if pin_packages:
            raise
        verdict = str(error)
    else:
        verdict = project.verdict()
    for name in installation.files:
        print(f"{'would copy' if dry_run else 'copy'} {name}")
    for name in sorted(set(installation.replaces) - set(installation.files)):
        print(f"{'would remove' if dry_run else 'remove'} {printable(name)}")
    if not dry_run:
        run(installation)
    print(
        f"{installation.bytes / 1e6:,.1f} MB {'would go' if dry_run else 'are'} in "
        f"{installation.model}"
    )
    if pin_packages:
        # Copying takes a while, in which Xcode may have saved the project.
        project = xcode.read_project(installation.model)
        _show(project, xcode.pinned(project), dry_run=dry_run)
        if not dry_run:
            xcode.pin(project)
            verdict = xcode.read_project(installation.model).verdict()
    print(f"Swift packages: {printable(verdict)}\n{NEXT}")


def _show(project: Project, text: str, *, dry_run: bool) -> None:
    """What changes in the project's file."""
    from model_export.layouts.xcode import diff

    if text == project.text:
        return
    print(f"{'would change' if dry_run else 'change'} {project.file}")
    print(diff(project, text), end="")
