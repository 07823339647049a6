"""Upload a bundle to the Hugging Face hub, with a model card made from its manifest.

The upload is one commit, so that a repository holds the whole bundle or none of it.
(`upload_folder` of huggingface_hub may make several commits, and takes a card only from the
directory, where it would be a file that the manifest does not list.) If an upload is interrupted,
the hub keeps what has arrived, and it is not sent again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx import __version__
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.manifest import MANIFEST
from fastvlm_mlx.errors import BundleError, DestinationError, GateError, OptionError
from model_export.publish.card import model_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from model_export.interruption import Progress

CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """An upload that was checked and can be made.

    Attributes:
        files: the names of the bundle's files, relative to it.
        bytes: the size of all of them.
        card: the text that becomes README.md.
    """

    bundle: Path
    repository: str
    revision: str | None
    files: tuple[str, ...]
    bytes: int
    card: str


def plan(
    bundle_path: Path,
    repository: str,
    *,
    revision: str | None = None,
    allow_failed_gates: bool = False,
    progress: Progress = lambda stage, done: None,
) -> Upload:
    """Check a bundle and write its card; the network is not used.

    A README.md that lies in the bundle is used in place of the card made from the manifest.

    Args:
        repository: `owner/name`.
        revision: the branch to upload to, which is created if it is not there; the main one unless
            given.

    Raises:
        BundleError: the bundle has no manifest, or is not what its manifest says.
        GateError: a gate failed, and `allow_failed_gates` is off.
        OptionError: `repository` is no name of a repository.
    """
    _check_name(repository)
    bundle = Bundle.open(bundle_path)
    if bundle.manifest is None:
        raise BundleError(
            f"{bundle_path} has no {MANIFEST}, so nothing says where its weights come from, under "
            "which licence, and what was checked: export the checkpoint, or upload the directory "
            "as it is with `hf upload`"
        )
    card = model_card(bundle.manifest, repository, revision)
    if not bundle.manifest["gates_passed"] and not allow_failed_gates:
        failed = ", ".join(g["name"] for g in bundle.manifest["gates"] if not g["passed"])
        raise GateError(
            f"{bundle_path} failed its check ({failed}): export with more bits, or push it with "
            "--allow-failed-gates, which the card then says"
        )
    progress("check files", None)
    bundle.check_files()
    if (bundle.path / CARD).is_file():
        card = (bundle.path / CARD).read_text(encoding="utf-8", errors="replace")
    size = sum((bundle.path / name).stat().st_size for name in bundle.files)
    return Upload(bundle.path, repository, revision, tuple(bundle.files), size, card)


def push(
    upload: Upload,
    *,
    private: bool = False,
    message: str | None = None,
    progress: Progress = lambda stage, done: None,
) -> str:
    """Create the repository and the branch where they are missing, and commit the bundle.

    The weights of the bundle that was there before are removed; all else in the repository stays.

    Args:
        private: whether a repository that has to be created is private.
        message: the message of the commit.

    Returns:
        The commit's URL.

    Raises:
        DestinationError: not logged in, not allowed, not reachable; or the repository holds a model
            that is not a bundle, or is public where `private` is asked for.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    # Some of the hub's progress bars would be drawn into a log file, too.
    bars = nullcontext() if sys.stderr.isatty() else disable_progress_bars()
    with bars, _in_one_sentence(upload.repository):
        if get_token() is None:
            raise DestinationError(
                "no token of the Hugging Face hub is found: log in with `hf auth login`, or set "
                "HF_TOKEN to a token that may write"
            )
        progress("upload", None)
        api = HfApi(library_name="fastvlm-mlx", library_version=__version__)
        replaced = _prepare(api, upload, private)
        additions = [CommitOperationAdd(name, upload.bundle / name) for name in upload.files]
        additions.append(CommitOperationAdd(CARD, upload.card.encode()))
        deletions = [CommitOperationDelete(name, is_folder=False) for name in replaced]
        commit = api.create_commit(
            upload.repository,
            [*additions, *deletions],
            commit_message=message or f"Upload {upload.bundle.name} with fastvlm-mlx {__version__}",
            revision=upload.revision,
        )
    return str(commit.commit_url)


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OptionError(f"{repository!r} is no name of a repository ({error})") from error
    if "/" not in repository:
        raise OptionError(
            f"{repository!r} names no owner: expected owner/name, the owner being your user name "
            "on the hub or an organization"
        )


def _prepare(api: HfApi, upload: Upload, private: bool) -> list[str]:
    """Create the repository and the branch where they are missing.

    Returns:
        The files of the bundle there that a loader would take for parts of the new one, because it
        reads every `.safetensors` file and one `.mlpackage`.
    """
    # With None the hub takes the owner's default.
    api.create_repo(upload.repository, private=private or None, exist_ok=True)
    if upload.revision is not None:
        api.create_branch(upload.repository, branch=upload.revision, exist_ok=True)
    info = api.model_info(upload.repository, revision=upload.revision)
    if private and info.private is False:
        raise DestinationError(
            f"{upload.repository} exists and is public, and --private is given: make it private in "
            "its settings on the hub, or choose another name"
        )
    present = {file.rfilename for file in info.siblings or ()}
    weights = {n for n in present if n.endswith((".safetensors", ".bin")) or ".mlpackage/" in n}
    if weights and MANIFEST not in present:
        raise DestinationError(
            f"{upload.repository} holds a model that is not a bundle ({min(weights)}): choose "
            "another repository, or a branch with --revision"
        )
    loaded = {n for n in weights if n.endswith(".safetensors") or ".mlpackage/" in n}
    return sorted(loaded - set(upload.files))


@contextmanager
def _in_one_sentence(repository: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into a DestinationError of one sentence."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except (
        errors.DeviceCodeError,
        errors.OIDCError,
        httpx2.HTTPError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        raise DestinationError(_sentence(repository, error)) from error


def _sentence(repository: str, error: Exception) -> str:
    import httpx2
    from huggingface_hub import errors

    # If the upload of a large file fails, the reason is in the cause of the error.
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) or type(cause).__name__
    again = "run the same command again, what has arrived is not sent twice"
    if isinstance(cause, httpx2.TransportError | errors.OfflineModeIsEnabled):
        return f"the hub can't be reached ({reason}): go online, and {again}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status == 401:
        return (
            "the hub does not accept the token: log in again with `hf auth login`, or set HF_TOKEN "
            "to a token that may write"
        )
    if status == 403:
        owner = repository.partition("/")[0]
        return (
            f"the token may not write to {repository}: use one with write access to {owner}, or "
            "push to a repository of your own"
        )
    return f"{repository} can't be uploaded to ({reason}): {again}"
