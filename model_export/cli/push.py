"""`fastvlm push`: the verb."""

from __future__ import annotations

from typing import Annotated

from fastvlm_mlx.cli.common import BundlePath, argument, option

REPOSITORY = "Repository"


def push(
    bundle: BundlePath,
    repository: Annotated[str, argument("REPO", "The repository on the hub, as owner/name.")],
    private: Annotated[
        bool,
        option("Make the repository private if it is created.", "--private", group=REPOSITORY),
    ] = False,
    revision: Annotated[
        str | None,
        option(
            "The branch to upload to, which is created if it is not there.",
            group=REPOSITORY,
            value="NAME",
            default="the main one",
        ),
    ] = None,
    message: Annotated[
        str | None, option("The message of the commit.", group=REPOSITORY, value="TEXT")
    ] = None,
    allow_failed_gates: Annotated[
        bool,
        option(
            "Upload a bundle that failed its check all the same; the card says so.",
            "--allow-failed-gates",
            group=REPOSITORY,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        option("Print the model card and upload nothing.", "--dry-run", group=REPOSITORY),
    ] = False,
) -> None:
    """The files go up in one commit, so that the repository has the whole bundle or none of it. The
    card is made from the bundle's manifest: its source, sizes, checks and licence."""
    from fastvlm_mlx.bundle.files import shown_bytes
    from fastvlm_mlx.cli import show
    from model_export.publish.push import plan
    from model_export.publish.push import push as run

    with show.stages() as progress:
        upload = plan(
            bundle,
            repository,
            revision=revision,
            allow_failed_gates=allow_failed_gates,
            progress=progress,
        )
        url = "" if dry_run else run(upload, private=private, message=message, progress=progress)
    if dry_run:
        print(upload.card, end="")
    else:
        count = len(upload.files)
        print(f"{count} files, {shown_bytes(upload.bytes)}, and a model card: {url}")
