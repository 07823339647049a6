"""Find a checkpoint on this machine: a directory, or a hub id that is downloaded."""

from __future__ import annotations

from pathlib import Path

from fastvlm_mlx.bundle.files import is_url, left_behind
from fastvlm_mlx.bundle.kind import HUB_ID
from fastvlm_mlx.errors import CheckpointError, OptionError
from fastvlm_mlx.models import archive
from fastvlm_mlx.models.hub import in_one_sentence
from fastvlm_mlx.models.names import CHECKPOINT, Published, published

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


def is_elsewhere(reference: str) -> bool:
    """Whether it would be downloaded, if no directory here has that name."""
    return is_hub_id(reference) or published(reference) is not None


def locate(reference: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the directory of a checkpoint, and `owner/name@commit` if it came from the hub.

    A path that exists here wins over a hub id and over the name of a published model.

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
    match, one = HUB_ID.fullmatch(str(reference)), published(reference)
    try:
        path = Path(reference).expanduser()
        exists = path.exists()
    # A NUL in it, a home that nobody has, or a name that is too long.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it is no path"
        raise CheckpointError(f"{reference} can't be opened as a path ({reason})") from error
    if one is not None and not exists:
        return _published(one, revision)
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


def _published(model: Published, revision: str | None) -> tuple[Path, str | None]:
    if model.hub is not None:
        return locate(model.hub, revision)
    if model.what != CHECKPOINT:
        raise CheckpointError(
            f"{model.name} is a bundle: expected a checkpoint, the bundle itself runs with "
            f"`fastvlm generate {model.name}`"
        )
    if revision is not None:
        raise OptionError(
            f"--revision {revision} is given and {model.name} is an archive: leave it out, or name "
            "a hub id"
        )
    return archive.entry(model).path, None


def _download(repository: str, revision: str | None) -> Path:
    """The snapshot in huggingface_hub's cache: what an export reads of it, resumed if cut."""
    from huggingface_hub import snapshot_download

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(BELOW),
            )
        )

    with in_one_sentence(repository, revision):
        snapshot = fetch((*SMALL_FILES, *WEIGHTS))
        if all(left_behind(file.name) for file in snapshot.glob("*.safetensors")):
            snapshot = fetch((*SMALL_FILES, *WEIGHTS, *PICKLED_WEIGHTS))
    return snapshot
