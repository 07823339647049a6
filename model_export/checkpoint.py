"""Find, identify and read a checkpoint: lazily, tensor by tensor, and read-only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from fastvlm_mlx.bundle import sha256
from fastvlm_mlx.config import MODEL_TYPE, FastVLMConfig
from fastvlm_mlx.errors import CheckpointError
from model_export import weights

if TYPE_CHECKING:
    import torch

# I64 is BatchNorm's counter's.
DTYPES = ("F32", "F16", "BF16", "I64")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """A FastVLM checkpoint directory in Apple's layout (`model_type` `llava_qwen2`).

    Opening it reads headers only and checks that every tensor is there with its shape. Tensors
    are read one at a time, by `mx` or `torch`, and kept by nobody.
    """

    def __init__(self, path: str | Path):
        """Raises CheckpointError or ConfigError: `path` is not such a checkpoint."""
        self.path = Path(path).expanduser()
        self.raw_config = _read_config(self.path)
        self.tensors = _read_headers(self.path)
        self.config = FastVLMConfig.from_dict(self.raw_config)
        specs = weights.encoder_specs(self.config.vision)
        specs += weights.llm_specs(self.config, tied="lm_head.weight" not in self.tensors)
        weights.check_names({n: t.shape for n, t in self.tensors.items()}, specs)

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding; from the tensors, config.json is often wrong."""
        if weights.HEAD[0] not in self.tensors:
            return True
        head, embedding = self.array(weights.HEAD[0]), self.array(weights.EMBEDDING[0])
        return bool(mx.array_equal(head, embedding).item())

    @property
    def llm_specs(self) -> list[weights.TensorSpec]:
        return weights.llm_specs(self.config, tied=self.tied)

    def array(self, source: str) -> mx.array:
        """The tensor under its source name, unevaluated.

        Raises:
            CheckpointError: the file can't be read any more.
        """
        file = self.tensors[source].file
        try:
            # A new lazy map each time: an array that was evaluated stays in its map, and memory.
            return mx.load(str(file))[source]  # type: ignore[call-overload,return-value]
        except RuntimeError as error:
            raise CheckpointError(f"{file} can't be read: {error}") from error

    def tensor(self, source: str) -> torch.Tensor:
        """The tensor under its source name, float32.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        tensor = to_torch(self.array(source))
        magnitude(source, tensor)
        return tensor.float()

    def encoder_state(self) -> dict[str, torch.Tensor]:
        """FastViTHD's state dict under its own names, float32, all of it.

        Raises:
            CheckpointError: a tensor holds NaN or infinity, or a variance is negative.
        """
        state = {}
        for spec in weights.encoder_specs(self.config.vision):
            tensor = self.tensor(spec.source)
            if spec.name.endswith("running_var") and bool((tensor < 0).any()):
                raise CheckpointError(
                    f"{spec.source} holds a negative variance: the checkpoint is damaged, download "
                    "it again"
                )
            state[spec.name] = tensor
        return state

    @cached_property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, in either form.

        Raises:
            CheckpointError: neither tokenizer.json nor vocab.json with merges.txt is there.
        """
        found = [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]
        names = {file.name for file in found}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise CheckpointError(
                f"{self.path} holds no tokenizer: expected tokenizer.json, or vocab.json and "
                "merges.txt; copy them from the model it was trained from"
            )
        return found

    @property
    def encoder_parameters(self) -> int:
        specs = weights.encoder_specs(self.config.vision)
        return sum(prod(spec.shape) for spec in specs if not weights.is_unused(spec.name))

    @property
    def llm_parameters(self) -> int:
        """The projector's included."""
        return sum(prod(spec.shape) for spec in self.llm_specs)

    @property
    def name(self) -> str:
        """What the checkpoint calls itself, or its directory's name."""
        return str(self.raw_config.get("_name_or_path") or self.path.resolve().name)

    @property
    def generation_config(self) -> dict[str, Any]:
        file = self.path / "generation_config.json"
        return _read_json(file) if file.is_file() else {}

    @property
    def weight_files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def license(self) -> str:
        """What the checkpoint says of its licence: config.json, or its model card, or its own file.

        Weights released by Apple carry none of these inside the download, so its absence is told.
        """
        if isinstance(self.raw_config.get("license"), str):
            return self.raw_config["license"]
        card = self.path / "README.md"
        if card.is_file():
            for line in card.read_text(errors="replace").splitlines()[:40]:
                if line.startswith("license:"):
                    return line.removeprefix("license:").strip()
        for name in ("LICENSE", "LICENSE_MODEL", "LICENSE.txt"):
            if (self.path / name).is_file():
                return f"see {name} of the source checkpoint"
        return "not stated by the checkpoint; Apple's FastVLM weights are apple-amlr, research only"

    def source(self) -> dict[str, Any]:
        """What the manifest says of where the weights come from: names, sizes, SHA-256."""
        files = [self.path / "config.json", *self.weight_files]
        return {
            "name": self.name,
            "directory": self.path.resolve().name,
            "license": self.license,
            "files": {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files},
        }


def to_torch(array: mx.array) -> torch.Tensor:
    """The same memory as a torch tensor, bfloat16 included, which numpy does not have."""
    import torch

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.asarray(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(array))


def magnitude(name: str, tensor: torch.Tensor) -> float:
    """The largest magnitude in the tensor of this name.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    # The extremes carry NaN and infinity, and unlike isfinite() need no temporary.
    low, high = (float(extreme) for extreme in tensor.aminmax())
    if not isfinite(low) or not isfinite(high):
        raise CheckpointError(
            f"{name} holds NaN or infinity, expected finite weights: the checkpoint is damaged, or "
            "its training diverged"
        )
    return max(-low, high)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}, expected a JSON object")
    return data


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: expected a checkpoint directory")
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file: expected the directory that holds config.json and the weights"
        )
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} holds no config.json: expected a FastVLM checkpoint directory ({MODEL_TYPE})"
        )
    config = _read_json(file)
    found = config.get("model_type")
    if found != MODEL_TYPE:
        raise CheckpointError(
            f"{file} describes {_architecture(config)}: expected a FastVLM checkpoint in Apple's "
            f"layout (model_type {MODEL_TYPE!r})"
        )
    return config


def _architecture(config: dict[str, Any]) -> str:
    architectures = config.get("architectures")
    names = ", ".join(map(str, architectures)) if isinstance(architectures, list) else ""
    return f"model_type {config.get('model_type')!r}" + (f" ({names})" if names else "")


def _read_headers(path: Path) -> dict[str, StoredTensor]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise CheckpointError(
                f"{index} has no weight_map of file names: download the checkpoint again"
            )
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(
                    f"{index} points to {name!r}: expected files of its own directory"
                )
            if not (path / name).is_file():
                raise CheckpointError(
                    f"{path / name} is missing: expected the {len(names)} files that {index.name} "
                    "names, download it again"
                )
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        raise CheckpointError(
            f"{path} holds no weights: expected model.safetensors, or several with an index"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for key, tensor in _read_header(path / name).items():
            if key in tensors:
                raise CheckpointError(
                    f"{key} is in both {tensors[key].file.name} and {name}: expected it once, "
                    "remove the file that does not belong to this checkpoint"
                )
            tensors[key] = tensor
    if any(name.startswith("language_model.") for name in tensors):
        raise CheckpointError(
            f"{path} is a bundle, not a checkpoint: give the PyTorch checkpoint it was made from"
        )
    return tensors


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(str(file), framework="numpy") as stream:
            entries = {key: stream.get_slice(key) for key in stream.keys()}  # noqa: SIM118
            tensors = {
                key: StoredTensor(file, entry.get_dtype(), tuple(entry.get_shape()))
                for key, entry in entries.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}): download it again"
        ) from error
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{key} is stored as {tensor.dtype}: expected F32, F16 or BF16, an unquantized "
                "checkpoint"
            )
    return tensors
