"""`fastvlm inspect`: the verb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvlm_mlx.cli.app.verbs import Additions
from fastvlm_mlx.cli.common import Json, argument, print_json
from fastvlm_mlx.errors import BundleError


def inspect(
    call: typer.Context,
    path: Annotated[Path, argument("PATH", "The directory of a bundle or of a checkpoint.")],
    as_json: Json = False,
) -> None:
    """The table has the sizes of the parts, the precision, the input size, the licence, and for a
    bundle the checks of its export. Sizes are taken from the files, not from the manifest."""
    from fastvlm_mlx.cli import show

    additions: Additions = call.obj
    facts = facts_of(path, additions.checkpoint_facts)
    if as_json:
        print_json(facts)
    else:
        show.print_facts(facts)


def facts_of(path: Path, checkpoint_facts: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What is at `path`: a bundle's facts, or else what `checkpoint_facts` says of it.

    Raises:
        BundleError, CheckpointError, ConfigError: it is neither, or can't be read.
    """
    from fastvlm_mlx.bundle.kind import is_bundle, is_neither
    from fastvlm_mlx.inspection import inspect_bundle

    try:
        path = Path(path).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no path"
        raise BundleError(f"{path!r} can't be opened as a path ({reason})") from error
    if not exists:
        raise BundleError(
            f"{path} does not exist: expected the directory of a bundle or of a checkpoint; "
            "export, plan, sweep, compare and `verify --checkpoint` take hub ids as well"
        )
    if not path.is_dir():
        raise BundleError(f"{path} is a file: expected the directory of a bundle or a checkpoint")
    if is_bundle(path):
        return inspect_bundle(path)
    if is_neither(path):
        raise BundleError(
            f"{path} holds no config.json: expected the directory of a bundle or a checkpoint"
        )
    return checkpoint_facts(path)
