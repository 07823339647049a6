"""The Hugging Face hub: what a repository holds, told before it is downloaded, and its bundle."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.files import is_file, sha256
from fastvlm_mlx.bundle.kind import ADAPTER_CONFIG, LANGUAGE
from fastvlm_mlx.bundle.manifest import MANIFEST
from fastvlm_mlx.errors import BundleError, CheckpointError, FastVLMError, HubUnreachableError
from fastvlm_mlx.machine import tell
from fastvlm_mlx.models import cache
from fastvlm_mlx.models.names import BUNDLE

# No part of a bundle.
_LEFT = (".*", "README.md")
_COMMIT = re.compile(r"\w[\w-]{0,99}")


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub; None where the hub does not say."""

    bytes: int | None
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Attributes:
        revision: the one that was asked for.
    """

    name: str
    revision: str | None
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def is_adapter(self) -> bool:
        """Whether its model depends on another, its base."""
        weights = [n for n in self.files if n.endswith(".safetensors") and "/" not in n]
        return (
            ADAPTER_CONFIG in self.files
            or "mm_projector.bin" in self.files
            or (weights == ["mm_projector.safetensors"])
        )


def look(name: str, revision: str | None) -> Repository:
    """Ask the hub which commit a revision is, and which files it has.

    Raises:
        HubUnreachableError: there is no answer.
        CheckpointError: there is no such repository or revision, or it is gated.
    """
    from huggingface_hub import HfApi

    with in_one_sentence(name, revision):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = {
            str(file.rfilename): RemoteFile(file.size, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
        }
        # It tells one model from another, and becomes a part of a path.
        commit = str(info.sha or "")
        if _COMMIT.fullmatch(commit) is None:
            raise ValueError(f"it names no commit but {info.sha!r}")
    for file in files:
        if file.startswith("/") or ".." in file.split("/"):
            raise CheckpointError(
                f"{name} lists {file}, which leads out of its directory: choose another repository"
            )
    return Repository(name, revision, commit, files)


def holds_bundle(repository: Repository) -> bool:
    """Whether it is a bundle's, ours, Apple's or mlx-vlm's. At most a header is downloaded.

    Raises:
        CheckpointError: as `look`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    if MANIFEST in repository.files:
        return True
    weights = sorted(n for n in repository.files if n.endswith(".safetensors") and "/" not in n)
    if not weights:
        return any(".mlpackage/" in name for name in repository.files)
    try:
        with in_one_sentence(repository.name, repository.revision):
            found = HfApi().parse_safetensors_file_metadata(
                repository.name, weights[0], revision=repository.commit
            )
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(
            f"{weights[0]} of {repository.name} is no safetensors file ({error}): expected the "
            "weights of a FastVLM, choose another repository"
        ) from error
    return any(name.startswith(LANGUAGE) for name in found.tensors)


def bundle(repository: Repository) -> cache.Entry:
    """The bundle of a repository, in the cache, downloaded if it is not there.

    Raises:
        CheckpointError: as `look`.
        BundleError: what arrived is not what the hub lists, or is no whole bundle.
        DestinationError: the disk is full, or the cache can't be written.
    """
    at = f"{repository.name}@{repository.commit}"
    key = cache.Key(repository.name, {"hub": at})
    if found := cache.find(key):
        return found
    planned = cache.Entry(
        repository.name,
        BUNDLE,
        f"{repository.name} on the hub",
        "",
        0,
        0.0,
        reference=repository.name,
        revision=repository.revision,
        commit=repository.commit,
    )

    def make(target: Path, partial: Path) -> None:
        from huggingface_hub import snapshot_download

        tell(f"downloading the bundle {at}")
        with in_one_sentence(repository.name, repository.revision):
            snapshot_download(
                repository.name,
                revision=repository.commit,
                local_dir=partial,
                ignore_patterns=list(_LEFT),
            )
        _check(repository, partial)
        Bundle.open(partial)
        # huggingface_hub's own books.
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        partial.rename(target)

    waiting = f"another process downloads {repository.name}; waiting for it, Ctrl-C ends that"
    made = cache.obtain(key, planned, make, waiting=waiting)
    cache.announce(made)
    return made


def _check(repository: Repository, directory: Path) -> None:
    """Compare what arrived with the hub's list; offline, huggingface_hub gives what is there."""
    for name, remote in repository.files.items():
        if name.startswith(".") or name == "README.md":
            continue
        file = directory / name
        there = is_file(file)
        wrong = not there or (remote.bytes is not None and file.stat().st_size != remote.bytes)
        if wrong or (remote.sha256 is not None and sha256(file) != remote.sha256):
            if there:
                file.unlink()
            raise BundleError(
                f"{name} of {repository.name} did not arrive as the hub has it: run the same "
                "command again, it resumes"
            )


@contextmanager
def in_one_sentence(repository: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence.

    Raises:
        HubUnreachableError: the hub gives no answer.
        CheckpointError: anything else that keeps a repository from being downloaded.
        DestinationError: the disk is full.
    """
    import errno

    import httpx2
    from huggingface_hub import errors as hub

    name = repository + (f" at revision {revision}" if revision else "")
    try:
        yield
    except hub.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated on the hub: accept its terms there and log in with `hf auth login`"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(
            f"the hub's {repository} has no revision {revision}: expected a branch, a tag or a "
            "commit of it"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a directory here nor a repository on the hub: correct the "
            "name, or log in with `hf auth login` if it is private"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise HubUnreachableError(
            f"{name} is no directory here and not whole in the hub's cache, and the hub can't be "
            "reached: go online once to download it, or give a directory"
        ) from error
    # The last four are what becomes of an answer that is no hub's, a login page for example; an
    # ImportError, of a proxy that needs a package which is not installed.
    except (
        hub.HfHubHTTPError,
        httpx2.HTTPError,
        OSError,
        ImportError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{name} can't be downloaded, the disk of {error.filename or 'the cache'} is "
                "full: make room, then run the same command again, it resumes"
            ) from error
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> FastVLMError:
    import httpx2

    reason = str(error).partition("\n")[0]
    unreachable = isinstance(error, httpx2.TransportError) or _status(error) >= 500
    kind = HubUnreachableError if unreachable else CheckpointError
    return kind(
        f"{name} can't be downloaded from the hub ({reason}): run the same command again, it "
        "resumes"
    )


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)
