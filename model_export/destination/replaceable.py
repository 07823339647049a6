"""What --overwrite may replace: a bundle, with nothing beside it that no export writes."""

from __future__ import annotations

import re
from pathlib import Path

from fastvlm_mlx.bundle.bundle import ENCODER_PREFIX, MLX_PROJECTOR
from fastvlm_mlx.bundle.config import MODEL_TYPE
from fastvlm_mlx.bundle.files import is_litter
from fastvlm_mlx.bundle.kind import CONFIG, LANGUAGE, tensor_names
from fastvlm_mlx.bundle.manifest import MANIFEST
from fastvlm_mlx.bundle.schema import read_json
from fastvlm_mlx.errors import DestinationError
from model_export.destination.content import Content

# The files of a bundle, ours or as Apple and mlx-vlm publish them. What has another name is
# somebody's, whatever a manifest says of it.
_PART_OF_A_BUNDLE = re.compile(
    r"manifest\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|(config|preprocessor_config|processor_config|generation_config)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt"
    r"|chat_template\.(jinja|json)|LICENSE[\w.-]{0,100}"
    r"|[^/]+\.mlpackage/(Manifest\.json|Data/(.+/)?([^/]+\.(mlmodel|bin)"
    r"|FeatureDescriptions\.json|Metadata\.json))",
    re.ASCII,
)
# How tensors of a bundle begin, in either layout.
_PROJECTOR = (*MLX_PROJECTOR, *MLX_PROJECTOR.values())
_TENSORS = (LANGUAGE, ENCODER_PREFIX, *_PROJECTOR)
_MODEL_TYPES = (MODEL_TYPE, "fastvlm")
# Of a manifest of whatever version.
_MANIFEST_KEYS = frozenset({"schema_version", "layout", "source", "encoder", "llm", "gates"})


def foreign(destination: Path, found: Content) -> str | None:
    """The first file of a directory that is no part of a bundle, or what keeps the directory from
    being one; None where a bundle is all that is there, or nothing."""
    files = [name for name in found.files if not is_litter(name.rpartition("/")[2])]
    if other := [name for name in files if not _PART_OF_A_BUNDLE.fullmatch(name)]:
        return other[0]
    if not files:
        return None
    names = list(tensor_names(destination))
    if not all(name.startswith(_TENSORS) for name in names):
        return "the tensors of a checkpoint"
    if MANIFEST in files:
        return _unlisted(destination, files)
    return None if _is_published(destination, files, names) else files[0]


def _unlisted(destination: Path, files: list[str]) -> str | None:
    """The first file that the manifest, if it is one of ours, does not list."""
    try:
        manifest = read_json(destination, destination / MANIFEST, DestinationError, remedy="")
    except DestinationError:
        return MANIFEST
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not manifest.keys() >= _MANIFEST_KEYS:
        return MANIFEST
    return next((name for name in files if name not in listed and name != MANIFEST), None)


def _is_published(destination: Path, files: list[str], names: list[str]) -> bool:
    """Whether a directory without a manifest is a bundle as Apple and mlx-vlm publish them: the
    language model and projector of one, and an encoder."""
    try:
        config = read_json(destination, destination / CONFIG, DestinationError, remedy="")
    except DestinationError:
        return False
    package = any(name.endswith(".mlpackage/Manifest.json") for name in files)
    return (
        config.get("model_type") in _MODEL_TYPES
        and any(name.startswith(LANGUAGE) for name in names)
        and any(name.startswith(_PROJECTOR) for name in names)
        and (package or any(name.startswith(ENCODER_PREFIX) for name in names))
    )
