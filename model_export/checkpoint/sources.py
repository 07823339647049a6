"""Find a checkpoint and say what it is, by looking: every kind ends as tensors under Apple's names.

A directory or a hub id; Apple's layout, transformers', a LoRA adapter or a projector over a base.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.config import MODEL_TYPE, TRANSFORMERS_MODEL_TYPE, VisionConfig
from fastvlm_mlx.bundle.directory import Directory
from fastvlm_mlx.bundle.files import is_file
from fastvlm_mlx.bundle.kind import is_bundle, what_is_below
from fastvlm_mlx.errors import CheckpointError, FastVLMError, OptionError
from model_export.checkpoint import fast_vlm, hub, lora, lora_config
from model_export.checkpoint.names import HEAD, from_transformers
from model_export.checkpoint.settings import check_settings
from model_export.checkpoint.weights.tensors import SourceTensor
from model_export.checkpoint.weights.weight_files import has_weights, read_json, read_weights


@dataclass(frozen=True)
class Source:
    """A checkpoint as found.

    Attributes:
        kind: what it is, in words.
        directories: where its files are looked for, the base's after its own.
        raw_config: `config.json` in Apple's words.
        tensors: under Apple's names.
        hub_id: `owner/name@commit` if it came from the hub.
        base: what it is a difference to.
        tied: whether the head is the embedding; None where the tensors have to be compared.
    """

    kind: str
    directories: tuple[Path, ...]
    raw_config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    hub_id: str | None = None
    base: Source | None = None
    tied: bool | None = None


def open_source(
    reference: str | Path, *, base: str | Path | None = None, revision: str | None = None
) -> Source:
    """Identify what is at `reference` and read its headers.

    Args:
        reference: a directory, or a hub id `owner/name` with an optional `@revision`.
        base: for an adapter or a projector, in place of the base that it names.
        revision: of the hub id.

    Raises:
        CheckpointError, ConfigError: nothing there, not FastVLM, or not whole.
        OptionError: `base` or `revision` where there is no use for it.
    """
    path, hub_id = hub.locate(reference, revision)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file: expected the directory of a checkpoint, which holds config.json "
            "and the weights"
        )
    if is_bundle(path):
        raise _bundle_found(path)
    adapter = (path / lora.ADAPTER_CONFIG).is_file()
    projector = [path / name for name in lora.PROJECTOR_FILES if (path / name).is_file()]
    whole = has_weights(path)
    if adapter and whole:
        raise CheckpointError(
            f"{path} holds two checkpoints, a whole one and an adapter ({lora.ADAPTER_CONFIG}): "
            "expected one, move the other away"
        )
    if adapter:
        return _adapter(path, hub_id, base)
    if projector and not whole:
        return _projector(path, hub_id, projector[0], base)
    if base is not None:
        raise OptionError(
            f"--base is given and {path} is not an adapter but a checkpoint of its own: leave it "
            "out"
        )
    return _whole(path, hub_id)


def _bundle_found(path: Path) -> CheckpointError:
    name = None
    with suppress(FastVLMError):
        manifest = Directory.look(path).manifest
        name = manifest["source"]["name"] if manifest is not None else None
    return CheckpointError(
        f"{path} is a bundle: expected a checkpoint, give the one that it was made from"
        + (f", {name}" if name else "")
    )


def _whole(path: Path, hub_id: str | None) -> Source:
    file = path / "config.json"
    if not file.is_file():
        if below := what_is_below(path):
            raise CheckpointError(
                f"{path} holds no config.json but {below}: give the one that is meant"
            )
        raise CheckpointError(
            f"{path} holds no config.json: expected a FastVLM checkpoint directory ({MODEL_TYPE} "
            f"or {TRANSFORMERS_MODEL_TYPE}), or an adapter's"
        )
    raw = read_json(file)
    kind = raw.get("model_type")
    if kind not in (MODEL_TYPE, TRANSFORMERS_MODEL_TYPE):
        raise CheckpointError(
            f"{file} describes {_architecture(raw)}: expected a FastVLM checkpoint in Apple's "
            f"layout (model_type {MODEL_TYPE!r}) or in transformers' ({TRANSFORMERS_MODEL_TYPE!r})"
        )
    if kind == MODEL_TYPE:
        check_settings(raw, str(file))
        return Source("Apple's layout", (path,), raw, read_weights(path), hub_id)
    config = fast_vlm.apple_config(raw, path)
    vision = VisionConfig.from_dict(config["vision_config"])
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in read_weights(path).items():
        # A name that is in no table stays, to be named by the check of all names.
        tensors[from_transformers(name, vision) or name] = tensor
    return Source("transformers' layout", (path,), config, tensors, hub_id)


def _adapter(path: Path, hub_id: str | None, given: str | Path | None) -> Source:
    config = lora_config.LoraConfig.read(path / lora.ADAPTER_CONFIG)
    base = _base(path, given, config.base, lora.ADAPTER_CONFIG)
    tensors = lora.merge_adapter(path, config, base.tensors, _rename(base))
    return _over(base, "LoRA adapter", path, hub_id, tensors)


def _projector(path: Path, hub_id: str | None, file: Path, given: str | Path | None) -> Source:
    config = path / "config.json"
    named = read_json(config).get("_name_or_path") if config.is_file() else None
    base = _base(path, given, named if isinstance(named, str) else None, "config.json")
    tensors = lora.replace_projector(file, base.tensors)
    return _over(base, "projector", path, hub_id, tensors)


def _over(
    base: Source, kind: str, path: Path, hub_id: str | None, tensors: dict[str, SourceTensor]
) -> Source:
    """A fine-tune's own config.json, where it has one, stands over its base's."""
    file = path / "config.json"
    raw = read_json(file) if file.is_file() else {}
    if raw.get("model_type") == TRANSFORMERS_MODEL_TYPE:
        raw = fast_vlm.apple_config(raw, path)
    elif raw.get("model_type") == MODEL_TYPE:
        check_settings(raw, str(file))
    else:
        raw = {}
    return Source(
        kind, (path, *base.directories), {**base.raw_config, **raw}, tensors, hub_id, base
    )


def _base(path: Path, given: str | Path | None, named: str | None, where: str) -> Source:
    """The base that was given, or else the one that is named, as a path or a hub id.

    Raises:
        CheckpointError: it is missing, or is itself a difference to another.
    """
    if given is not None:
        base = _open_base(given)
    elif not named:
        raise CheckpointError(
            f"{path} is a difference to a base, and its {where} names none: give the base's "
            "directory or hub id with --base"
        )
    else:
        # Training scripts name it relative to where they ran.
        near = [Path(named).expanduser(), path / named, path.parent / named]
        found = next((p for p in near if p.is_dir()), None)
        if found is None and not hub.is_hub_id(named):
            raise CheckpointError(
                f"{path / where} names the base {named}, which does not exist here: give the "
                "base's directory or hub id with --base"
            )
        try:
            base = _open_base(found or named)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} (the base that {path / where} names; --base)"
            ) from error
    return base


def _open_base(reference: str | Path) -> Source:
    path, hub_id = hub.locate(reference)
    # Before it is opened: it may be a difference to this one.
    differences = (lora.ADAPTER_CONFIG, *lora.PROJECTOR_FILES)
    if not has_weights(path) and any(is_file(path / name) for name in differences):
        raise CheckpointError(
            f"the base {path} is itself a difference to another base: merge it first"
        )
    return _whole(path, hub_id)


def _rename(base: Source) -> lora.Rename:
    """Names of either layout → Apple's, whichever the base is stored in."""
    vision = _vision(base.raw_config)
    known: Mapping[str, SourceTensor] = base.tensors

    def rename(name: str) -> str | None:
        if name in known or name == HEAD[0]:
            return name
        return from_transformers(name, vision)

    return rename


def _vision(raw: dict[str, Any]) -> VisionConfig:
    return (
        VisionConfig.from_dict(raw["vision_config"]) if raw.get("vision_config") else VisionConfig()
    )


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    listed = ", ".join(map(str, names)) if isinstance(names, list) else ""
    return f"model_type {config.get('model_type')!r}" + (f" ({listed})" if listed else "")
