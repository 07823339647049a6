"""The files of a directory that hold its weights, and the tensors that are in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.bundle import schema
from fastvlm_mlx.bundle.files import MAX_FILES, is_file, left_behind
from fastvlm_mlx.errors import CheckpointError

if TYPE_CHECKING:
    pass
from model_export.checkpoint.weights.pickled import pickled_tensors
from model_export.checkpoint.weights.tensors import DTYPES, SourceTensor, safe_tensors

# Files of full weights, by preference; an adapter's and a projector's have names of their own.
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError if it is none, or outside its directory."""
    return schema.read_json(file.parent, file, CheckpointError, remedy="download it again")


def read_weights(directory: Path) -> dict[str, SourceTensor]:
    """List the tensors of a directory's full weights by their names; only headers are read.

    Both forms of one checkpoint are often published together: the safetensors are read, unless
    files of theirs are missing and the other form is complete.

    Raises:
        CheckpointError: no weights, two different sets of them, a file that is missing or not
            whole, an index that points elsewhere.
    """
    safe = _weight_files(directory, SAFETENSORS)
    pickled = _weight_files(directory, PICKLED)
    whole = [files for files in (safe, pickled) if files and all(map(is_file, files))]
    if not safe and not pickled:
        raise CheckpointError(
            f"{directory} holds no weights: expected model.safetensors or pytorch_model.bin, or "
            "several with an index"
        )
    files = whole[0] if whole else safe or pickled
    for file in files:
        if not is_file(file):
            raise CheckpointError(
                f"{file} is missing: expected the {len(files)} files that the index names, "
                "download it again"
            )
    return read_tensors(files)


def has_weights(directory: Path) -> bool:
    """Whether the directory holds full weights, whole or not."""
    return any(_weight_files(directory, name) for name in (SAFETENSORS, PICKLED))


def read_tensors(files: list[Path]) -> dict[str, SourceTensor]:
    """Read the headers of several safetensors or `.bin` files.

    Raises:
        CheckpointError: a file is not whole, holds something other than tensors, or a tensor is
            in two of them.
    """
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        header: Mapping[str, SourceTensor]
        header = safe_tensors(file) if file.suffix == ".safetensors" else pickled_tensors(file)
        for key, tensor in header.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{key} is stored as {tensor.dtype}: expected F32, F16 or BF16, an unquantized "
                    "PyTorch checkpoint and not a bundle"
                )
            if key in tensors:
                raise CheckpointError(
                    f"{key} is in both {tensors[key].files[0].name} and {file.name}: expected it "
                    "once, remove the file that does not belong to this checkpoint"
                )
            tensors[key] = tensor
    return tensors


def _weight_files(directory: Path, name: str) -> list[Path]:
    """The files of one form, `name` being that of a single one; those of an index may not exist."""
    stem, suffix = Path(name).stem, Path(name).suffix
    # Safetensors of any name are weights, as in older exports; pickles of other names are anything.
    found = directory.glob("*.safetensors" if name == SAFETENSORS else f"{stem}*.bin")
    present = {
        file.name
        for file in found
        if not file.name.startswith(("adapter_", "mm_proj")) and not left_behind(file.name)
    }
    index = directory / f"{name}.index.json"
    if not index.is_file():
        if name in present and any(re.fullmatch(rf"{stem}-\d+-of-\d+{suffix}", n) for n in present):
            raise CheckpointError(
                f"{directory} holds two checkpoints, {name} and {stem}-…{suffix}: expected one, "
                "remove the other"
            )
        return [directory / file for file in sorted(present)]
    named = _index_names(index)
    if extra := sorted(n for n in present - named if n.startswith(stem)):
        raise CheckpointError(
            f"{directory} holds two checkpoints, {extra[0]} and the one of {index.name}: expected "
            "one, remove the other"
        )
    return [directory / file for file in sorted(named)]


def _index_names(index: Path) -> set[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map: expected each tensor's file, download it again"
        )
    # Some hundred thousand tensors are in a few files.
    texts = {name for name in weight_map.values() if isinstance(name, str)}
    others = [name for name in weight_map.values() if not isinstance(name, str)]
    for name in [*others[:1], *sorted(texts)]:
        if not isinstance(name, str) or Path(name).name != name or not name.strip("."):
            raise CheckpointError(
                f"{index} points to {name!r}: expected files of its own directory, download "
                "the checkpoint again"
            )
        if len(texts) > MAX_FILES:
            raise CheckpointError(
                f"{index} points to {len(texts):,} files: expected {MAX_FILES:,} at most"
            )
    return texts
