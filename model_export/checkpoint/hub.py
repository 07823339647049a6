"""Find a checkpoint on this machine: a directory, or a hub id that is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from fastvlm_mlx.bundle.files import is_url, left_behind
from fastvlm_mlx.errors import CheckpointError, OptionError

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
# Of the repository's top directory; a `.bin` of full weights only where there are no safetensors.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.index.json",
    "LICENSE*",
    "README.md",
)
WEIGHTS = ("*.safetensors", "non_lora_trainables.bin", "mm_projector.bin")
PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
BELOW = ("*/*",)


def is_hub_id(reference: str) -> bool:
    return HUB_ID.fullmatch(reference) is not None


def locate(reference: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the directory of a checkpoint, and `owner/name@commit` if it came from the hub.

    A path that exists here wins over a hub id.

    Raises:
        CheckpointError: no such path, or no such repository, or it can't be downloaded.
        OptionError: a revision of something that has none.
    """
    if not isinstance(reference, str | Path):
        raise CheckpointError(
            f"a checkpoint was looked for at {reference!r}, a {type(reference).__name__}: expected "
            "a path or a hub id"
        )
    if is_url(reference):
        raise CheckpointError(
            f"{reference} is a URL: expected a checkpoint directory, or a hub id such as "
            "apple/FastVLM-0.5B"
        )
    match = HUB_ID.fullmatch(str(reference))
    try:
        path = Path(reference).expanduser()
        exists = path.exists()
    # A NUL in it, a home that nobody has, or a name that is too long.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it is no path"
        raise CheckpointError(f"{reference} can't be opened as a path ({reason})") from error
    if exists or match is None:
        if not exists:
            raise CheckpointError(
                f"{path} does not exist: expected a checkpoint directory, or a hub id such as "
                "apple/FastVLM-0.5B"
            )
        if revision is not None:
            raise OptionError(
                f"--revision {revision} is given and {path} is a directory: leave it out, or name "
                "a hub id"
            )
        return path, None
    repository, inline = match.groups()
    if inline and revision and inline != revision:
        raise OptionError(f"{reference} names a revision and --revision is {revision}: give one")
    snapshot = _download(repository, revision or inline)
    return snapshot, f"{repository}@{snapshot.name}"


def _download(repository: str, revision: str | None) -> Path:
    """The snapshot in huggingface_hub's cache: what an export reads of it, resumed if cut."""
    import httpx2
    from huggingface_hub import errors, snapshot_download

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(BELOW),
            )
        )

    name = repository + (f" at revision {revision}" if revision else "")
    try:
        snapshot = fetch((*SMALL_FILES, *WEIGHTS))
        if all(left_behind(file.name) for file in snapshot.glob("*.safetensors")):
            snapshot = fetch((*SMALL_FILES, *WEIGHTS, *PICKLED_WEIGHTS))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated on the hub: accept its terms there and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"the hub's {repository} has no revision {revision}: expected a branch, a tag or a "
            "commit of it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a directory here nor a repository on the hub: correct the "
            "name, or log in with `hf auth login` if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is no directory here and not whole in the hub's cache, and the hub can't be "
            "reached: go online once to download it, or give a directory"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, httpx2.HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{name} can't be downloaded from the hub ({reason}): run the same command again, it "
            "resumes"
        ) from error
    return snapshot
