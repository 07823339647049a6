"""A checkpoint, whatever it was stored as: its tensors under Apple's names, read lazily.

The intermediate form that everything after it works on. Read-only: nothing is ever written to a
source.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from fastvlm_mlx.bundle.config import FastVLMConfig
from fastvlm_mlx.bundle.files import MB, Stamp, inside, read_bytes, sha256
from fastvlm_mlx.errors import CheckpointError, printable
from model_export.checkpoint.lora import is_tied
from model_export.checkpoint.names import (
    EMBEDDING,
    HEAD,
    TensorSpec,
    check_names,
    encoder_specs,
    is_unused,
    llm_specs,
)
from model_export.checkpoint.settings import ROPE_THETA
from model_export.checkpoint.sources import Source, open_source
from model_export.checkpoint.weights.tensors import (
    ALL,
    ExtendedRows,
    SourceTensor,
    magnitude,
    to_torch,
)
from model_export.checkpoint.weights.weight_files import read_json

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


# Names and licences go into manifests, packages and model cards.
NAME_CHARACTERS = 200
CARD_BYTES = 10 * MB


class Checkpoint:
    """A FastVLM checkpoint, an adapter with its base, or a projector with its base.

    Opening it reads headers only and checks that every tensor is there with its shape. A tensor is
    read when it is asked for, as an array of MLX or torch, and is not kept.
    """

    def __init__(
        self,
        reference: str | Path,
        *,
        base: str | Path | None = None,
        revision: str | None = None,
        image_size: int | None = None,
    ):
        """
        Args:
            reference: a directory or a hub id.
            base: the base of an adapter or a projector, if it is not the one that it names.
            revision: the branch, tag or commit of a hub id.
            image_size: the encoder's input size in pixels, in place of the checkpoint's own.

        Raises:
            CheckpointError, ConfigError, OptionError: `reference` is not such a checkpoint.
        """
        self._open(open_source(reference, base=base, revision=revision), image_size)

    @classmethod
    def of(cls, source: Source) -> Checkpoint:
        """Open a source that was found already; raises as the constructor does."""
        checkpoint = cls.__new__(cls)
        checkpoint._open(source, None)
        return checkpoint

    def _open(self, source: Source, image_size: int | None) -> None:
        self._source = source
        self.path = source.directories[0]
        self.directories = source.directories
        self.tensors: dict[str, SourceTensor] = source.tensors
        self._stamps = {file: Stamp.of(file) for file in self.weight_files}
        raw = dict(source.raw_config)
        embedding = self.tensors.get(EMBEDDING[0])
        if embedding is not None and embedding.shape:
            # Training that resizes the vocabulary does not always say so.
            raw["vocab_size"] = embedding.shape[0]
        rope = raw.get("rope_parameters")
        stated = [raw.get("rope_theta"), rope.get("rope_theta") if isinstance(rope, dict) else None]
        # Not what mlx-lm's Qwen2 takes where nothing is said: this is the checkpoint's library.
        raw["rope_theta"] = next((theta for theta in stated if theta is not None), ROPE_THETA)
        config = FastVLMConfig.from_dict(raw)
        if image_size is not None:
            config = replace(config, vision=replace(config.vision, image_size=image_size))
            raw["mm_vision_tower"] = f"mobileclip_l_{image_size}"
            if raw.get("vision_config"):
                raw["vision_config"] = {**raw["vision_config"], "image_size": image_size}
        self.raw_config, self.config = raw, config
        specs = encoder_specs(config.vision)
        specs += llm_specs(config, tied="lm_head.weight" not in self.tensors)
        check_names({n: t.shape for n, t in self.tensors.items()}, specs)

    def with_vocabulary(self, rows: int, copied: int) -> Checkpoint:
        """The same checkpoint with `rows` rows of embedding and head, for ids beyond its own.

        Each new row is a copy of the row of id `copied`, a token that is never an answer. Its
        logit is that token's then, whatever the hidden state and whether or not the head is the
        embedding, and of two equal logits the lower id is chosen. (A row of zeros has logit 0,
        which is the largest where all others are negative.) What the embedding's new rows hold is
        never read: the encoder's features are put in their place.
        """
        if rows == self.config.text.vocab_size:
            return self
        tensors = {
            name: ExtendedRows(tensor, rows, copied) if name in (EMBEDDING[0], HEAD[0]) else tensor
            for name, tensor in self.tensors.items()
        }
        return Checkpoint.of(replace(self._source, tensors=tensors, raw_config=self.raw_config))

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding; from the tensors, config.json is often wrong."""
        return is_tied(self.tensors) if self._source.tied is None else self._source.tied

    @property
    def llm_specs(self) -> list[TensorSpec]:
        return llm_specs(self.config, tied=self.tied)

    def array(self, source: str, rows: slice = ALL) -> mx.array:
        """The tensor under its source name, or consecutive rows of it.

        Raises:
            CheckpointError: the file can't be read any more.
        """
        return self.tensors[source].read(rows)

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

        What no computation uses is zero where the checkpoint does not have it.

        Raises:
            CheckpointError: a tensor holds NaN or infinity, or a variance is negative.
        """
        import torch

        state = {}
        for spec in encoder_specs(self.config.vision):
            if spec.source not in self.tensors:
                state[spec.name] = torch.zeros(spec.shape)
                continue
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
        """The tokenizer's files, in either form; of an adapter that has none, its base's.

        Raises:
            CheckpointError: neither tokenizer.json nor vocab.json with merges.txt is there.
        """
        for directory in self.directories:
            found = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
            names = {file.name for file in found}
            if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names:
                for file in found:
                    inside(directory, file, CheckpointError)
                return found
        raise CheckpointError(
            f"{self.path} holds no tokenizer: expected tokenizer.json, or vocab.json and "
            "merges.txt; copy them from the model it was trained from"
        )

    @property
    def encoder_parameters(self) -> int:
        specs = encoder_specs(self.config.vision)
        return sum(prod(spec.shape) for spec in specs if not is_unused(spec.name))

    @property
    def llm_parameters(self) -> int:
        """The number of weights of the language model and the projector."""
        return sum(prod(spec.shape) for spec in self.llm_specs)

    @property
    def kind(self) -> str:
        """What it is stored as, in words."""
        return self._source.kind

    @property
    def name(self) -> str:
        """Its hub id, or what the checkpoint calls itself, or its directory's name."""
        return _name(self._source)

    @property
    def generation_config(self) -> dict[str, Any]:
        for directory in self.directories:
            if (directory / "generation_config.json").is_file():
                return read_json(directory / "generation_config.json")
        return {}

    @property
    def weight_files(self) -> list[Path]:
        return sorted({file for tensor in self.tensors.values() for file in tensor.files})

    @property
    def license(self) -> str:
        """What the checkpoint says of its licence: config.json, or its model card, or its own file;
        its base's where it says nothing.

        Weights released by Apple carry none of these inside the download, so its absence is told.
        """
        if isinstance(self.raw_config.get("license"), str):
            return printable(self.raw_config["license"], NAME_CHARACTERS)
        for directory in self.directories:
            if stated := _license(directory):
                return stated
        return "not stated by the checkpoint; Apple's FastVLM weights are apple-amlr, research only"

    def source(self) -> dict[str, Any]:
        """What the manifest says of where the weights come from: names, sizes, SHA-256.

        Raises:
            CheckpointError: a weight file is another one than when the checkpoint was opened.
        """
        described = _described(self._source, self.weight_files)
        for file, stamp in self._stamps.items():
            if not file.is_file() or Stamp.of(file) != stamp:
                raise CheckpointError(
                    f"{file} changed while it was read, and tensors of two models may be mixed: "
                    "run the same command again"
                )
        return {**described, "license": self.license}


def _name(source: Source) -> str:
    if source.hub_id:
        return source.hub_id
    # What an adapter's config.json names is its base.
    named = None if source.base else source.raw_config.get("_name_or_path")
    return printable(named or source.directories[0].resolve().name, NAME_CHARACTERS)


def _described(source: Source, weight_files: list[Path]) -> dict[str, Any]:
    directory = source.directories[0]
    config = [directory / name for name in ("config.json", "adapter_config.json")]
    files = [file for file in config if file.is_file()]
    files += [file for file in weight_files if file.parent == directory]
    described: dict[str, Any] = {
        "name": _name(source),
        "kind": source.kind,
        "directory": directory.resolve().name,
        "files": {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files},
    }
    if source.base is not None:
        described["base"] = _described(source.base, weight_files)
    return described


def _license(directory: Path) -> str | None:
    card = directory / "README.md"
    if card.is_file():
        text = read_bytes(directory, card, CheckpointError, CARD_BYTES).decode(errors="replace")
        for line in text.splitlines()[:40]:
            if line.startswith("license:"):
                return printable(line.removeprefix("license:"), NAME_CHARACTERS)
    for name in ("LICENSE", "LICENSE_MODEL", "LICENSE.txt"):
        if (directory / name).is_file():
            return f"see {name} of the source checkpoint"
    return None
