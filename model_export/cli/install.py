"""`fastvlm install`: the verb."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastvlm_mlx.cli.common import Out
from fastvlm_mlx.errors import DestinationError, OptionError, printable

if TYPE_CHECKING:
    from model_export.layouts.xcode import Project

NEXT = (
    "Next: open FastVLM.xcodeproj beside it in Xcode, choose your team under Signing & "
    "Capabilities, a device, and run"
)


def install(
    bundle: Out,
    app_dir: Annotated[
        Path, typer.Argument(help="The app/ directory of a clone of apple/ml-fastvlm.")
    ],
    pin_packages: Annotated[
        bool,
        typer.Option("--pin-packages", help="Ask for the Swift packages that the app builds with."),
    ] = False,
    unpin_packages: Annotated[
        bool, typer.Option("--unpin-packages", help="Undo --pin-packages alone; copy nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be done.")] = False,
) -> None:
    """Put a bundle where the demo app's Xcode project expects its model."""
    from model_export.layouts import xcode
    from model_export.layouts.install import install as run
    from model_export.layouts.install import model_directory, plan

    if pin_packages and unpin_packages:
        raise OptionError("--pin-packages and --unpin-packages are both given: choose one")
    if unpin_packages:
        project = xcode.read_project(model_directory(app_dir))
        _show(project, xcode.unpinned(project), dry_run=dry_run)
        if not dry_run:
            xcode.unpin(project)
        return
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
