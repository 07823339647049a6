"""Fine-tunes that are stored as a difference to a base: LoRA adapters, and single projectors.

PEFT writes `adapter_config.json` and `adapter_model.*`; LLaVA's training adds what it trained
without LoRA as `non_lora_trainables.bin`. A merged weight is computed when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.errors import CheckpointError
from model_export.checkpoint.lora_config import LoraConfig
from model_export.checkpoint.names import EMBEDDING, HEAD
from model_export.checkpoint.weights.tensors import (
    ALL,
    SourceTensor,
    from_torch,
    row_blocks,
    to_torch,
)
from model_export.checkpoint.weights.weight_files import read_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA = "non_lora_trainables.bin"
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
LORA_KEY = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")

# A tensor's name in an adapter, its prefixes removed → Apple's; None for one that is not FastVLM's.
Rename = Callable[[str], str | None]


@dataclass(frozen=True)
class MergedTensor:
    """float32 W + scale * B @ A; of an embedding, W + scale * (B @ A).T.

    `a` is [r, ...] and `b` [out, r], a convolution's kernel being part of `a`.
    """

    base: SourceTensor
    a: SourceTensor
    b: SourceTensor
    scale: float
    embedding: bool

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((*self.base.files, *self.a.files, *self.b.files)))

    def read(self, rows: slice = ALL) -> mx.array:
        import torch

        read = (self.a.read(), self.b.read(ALL if self.embedding else rows))
        a, b = (to_torch(array).float().flatten(1) for array in read)
        left, right = (a.T[rows], b.T) if self.embedding else (b, a)
        # A copy, so that the sum can be taken in place: no third matrix of this size.
        weight = to_torch(self.base.read(rows)).to(torch.float32, copy=True)
        weight.flatten(1).addmm_(left, right, alpha=self.scale)
        return from_torch(weight)


def merge_adapter(
    directory: Path, config: LoraConfig, base: Mapping[str, SourceTensor], rename: Rename
) -> dict[str, SourceTensor]:
    """Merge an adapter into `base`, and put its other tensors in place of the base's.

    Raises:
        CheckpointError: no adapter weights, a tensor that the base does not have, or one for a
            base of another shape.
    """
    files = [directory / name for name in ADAPTER_FILES if (directory / name).is_file()]
    if not files:
        raise CheckpointError(
            f"{directory} holds {ADAPTER_CONFIG} and no weights: expected "
            f"{' or '.join(ADAPTER_FILES)}, copy it there"
        )
    low_rank: dict[str, dict[str, SourceTensor]] = {}
    replaced: dict[str, SourceTensor] = {}
    for key, tensor in read_tensors(files[:1]).items():
        if "lora_magnitude_vector" in key:
            raise CheckpointError(f"{files[0]} holds {key}: DoRA, which is not supported")
        if match := LORA_KEY.fullmatch(key):
            module, embedding, side = match.groups()
            low_rank.setdefault(_strip(module), {})[side] = tensor
            low_rank[_strip(module)]["embedding" if embedding else "linear"] = tensor
        else:
            replaced[key] = tensor
    merged = _tied_apart(base, config, low_rank, replaced, rename)
    merged |= _renamed(replaced, base, rename)
    if (directory / NON_LORA).is_file():
        merged = replace_tensors(directory / NON_LORA, merged, rename)
    for module, sides in low_rank.items():
        name = _known(f"{module}.weight", next(iter(sides.values())), merged, rename)
        merged[name] = _merged(name, module, sides, merged[name], config)
    return merged


def replace_tensors(
    file: Path, base: Mapping[str, SourceTensor], rename: Rename
) -> dict[str, SourceTensor]:
    """Put the tensors of `file` in place of those of `base`.

    A head that is the embedding stays the embedding when only that is replaced.

    Raises:
        CheckpointError: a tensor that the base does not have.
    """
    tensors = _renamed(read_tensors([file]), base, rename)
    merged = dict(base)
    if EMBEDDING[0] in tensors and HEAD[0] not in tensors and is_tied(base):
        merged.pop(HEAD[0], None)
    return merged | tensors


def replace_projector(file: Path, base: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Put a projector that LLaVA's training saved by itself in place of the one of `base`.

    Raises:
        CheckpointError: `file` holds something else.
    """

    def rename(name: str) -> str | None:
        _, found, rest = name.rpartition("mm_projector.")
        return f"model.mm_projector.{rest}" if found else None

    return replace_tensors(file, base, rename)


def is_tied(tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether the head is the embedding; from the values, config.json is often wrong."""
    if HEAD[0] not in tensors:
        return True
    head, embedding = tensors[HEAD[0]], tensors[EMBEDDING[0]]
    if head.shape != embedding.shape:
        return False
    return all(
        mx.array_equal(head.read(rows), embedding.read(rows)).item()
        for rows in row_blocks(head.shape)
    )


def _tied_apart(
    base: Mapping[str, SourceTensor],
    config: LoraConfig,
    low_rank: Mapping[str, Any],
    replaced: Mapping[str, SourceTensor],
    rename: Rename,
) -> dict[str, SourceTensor]:
    """The base, with a head of its own where PEFT trained one of two tied matrices without the
    other: in PEFT the other one keeps the base's values."""
    names = {rename(f"{module}.weight") for module in low_rank}
    saved = {rename(_strip(key)): tensor for key, tensor in replaced.items()}
    touched = {EMBEDDING[0], HEAD[0]} & (names | set(saved))
    if not touched or not is_tied(base):
        return dict(base)
    embedding = base[EMBEDDING[0]]
    tensors = {**base, HEAD[0]: embedding}
    wrapped = {module.rpartition(".")[2] for module in config.modules_to_save}
    alone = EMBEDDING[0] in names or "embed_tokens" in wrapped
    resized = EMBEDDING[0] in saved and saved[EMBEDDING[0]].shape != embedding.shape
    # Saved without having been trained apart, as PEFT does with a resized vocabulary.
    if HEAD[0] not in touched and (not alone or resized or config.ensure_weight_tying):
        del tensors[HEAD[0]]
    return tensors


def _merged(
    name: str,
    module: str,
    sides: Mapping[str, SourceTensor],
    base: SourceTensor,
    config: LoraConfig,
) -> MergedTensor:
    if missing := {"A", "B"} - set(sides):
        raise CheckpointError(
            f"the adapter has no lora_{min(missing)} for {module}: it is not whole, save it again"
        )
    a, b, embedding = sides["A"], sides["B"], "embedding" in sides
    rank, scale = config.rank_and_scale(module)
    if a.shape[0] != rank or b.shape[1:2] != (rank,) or prod(b.shape) != b.shape[0] * rank:
        raise CheckpointError(
            f"the adapter's {module} is of shapes {list(a.shape)} and {list(b.shape)} where "
            f"{ADAPTER_CONFIG} says rank {rank}: they belong to different adapters"
        )
    made = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], *a.shape[1:])
    if made != base.shape:
        raise CheckpointError(
            f"the adapter changes {name} as a tensor of shape {list(made)} where the base's is "
            f"{list(base.shape)}: it belongs to another base, give that with --base"
        )
    return MergedTensor(base, a, b, scale, embedding)


def _renamed(
    tensors: Mapping[str, SourceTensor], base: Mapping[str, SourceTensor], rename: Rename
) -> dict[str, SourceTensor]:
    """Under Apple's names; every one known to the base and, vocabulary aside, of its shape."""
    renamed = {}
    for key, tensor in tensors.items():
        name = _known(_strip(key), tensor, base, rename)
        if (
            name in base
            and name not in (EMBEDDING[0], HEAD[0])
            and base[name].shape != tensor.shape
        ):
            raise CheckpointError(
                f"{tensor.files[0].name} holds {name} of shape {list(tensor.shape)} where the "
                f"base's is {list(base[name].shape)}: it belongs to another base, give that with "
                "--base"
            )
        renamed[name] = tensor
    return renamed


def _known(
    name: str, tensor: SourceTensor, base: Mapping[str, SourceTensor], rename: Rename
) -> str:
    apple = rename(name)
    if apple is None or (apple not in base and apple != HEAD[0]):
        raise CheckpointError(
            f"{tensor.files[-1]} holds {name}, which the base does not have: expected tensors of "
            "FastVLM, give the base that it was trained on with --base"
        )
    return apple


def _strip(key: str) -> str:
    """A name without what PEFT and its wrappers put around it."""
    key = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.|$)", "", key)
    key = key.removeprefix("module.").removeprefix("base_model.")
    return re.sub(r"^model\.(?=(model|lm_head)(\.|$))", "", key)
