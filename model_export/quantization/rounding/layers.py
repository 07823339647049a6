"""The language model's layers, one at a time: what AWQ, GPTQ and DWQ have in common.

Each layer is loaded, reads what comes out of those before it, is quantized, and is put into a file
where the writer finds its tensors. Resident are one layer in float32 and what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from torch import Tensor, nn

from fastvlm_mlx.bundle.quantization import Format
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.names import LAYER
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.encoder.references import Reference
from model_export.language import llm, qwen2
from model_export.language.evaluation import dialogues_of
from model_export.language.recipes import PREFIX, Scheme
from model_export.language.weights import SourceWeights, Weights
from model_export.options import ExportOptions

LAYERS = PREFIX + "model.layers."
MATRICES = tuple(name.removesuffix(".weight") for name, shape in LAYER if len(shape) == 2)
# The matrix whose input is recorded, for every matrix: those that read one input share it.
READS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.down_proj": "mlp.down_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "self_attn.o_proj": "self_attn.o_proj",
}

# By a matrix's name in its layer; None where it is not rounded.
Formats = Mapping[str, Format | None]
State = dict[str, Tensor]
# A layer's tensors as they are written, by their names in it.
StoredArrays = dict[str, list[mx.array]]


@dataclass
class HiddenStates:
    """The hidden states of one image's dialogue on their way through the layers.

    Attributes:
        hidden: [1, L, D], what the next layer reads.
        around: the attention's mask and the rotary embedding, by a layer's argument.
        scored: the places whose next token belongs to an answer.
    """

    hidden: Tensor
    around: dict[str, Any]
    scored: Tensor


@dataclass(frozen=True)
class LayerInputs:
    """One layer, the hidden states that go through it, and the formats that its matrices get."""

    layer: nn.Module
    samples: Sequence[HiddenStates]
    formats: Formats
    dtype: str

    def outputs(self) -> list[Tensor]:
        return [self.layer(s.hidden, **s.around) for s in self.samples]


@dataclass(frozen=True)
class Work:
    """What a method quantizes, in which formats, and the directory where the results wait.

    Attributes:
        scheme: the format of every matrix of the model.
    """

    checkpoint: Checkpoint
    scheme: Scheme
    options: ExportOptions
    directory: Path
    progress: Callable[[float], None]

    @property
    def count(self) -> int:
        return self.checkpoint.config.text.num_hidden_layers

    def layers(self) -> Iterator[tuple[str, State]]:
        """Read the source's layers in float32, and yield the prefix of each and its tensors.

        Raises:
            CheckpointError, OptionError: as `llm.convert`.
        """
        source = SourceWeights(self.checkpoint)
        for index in range(self.count):
            prefix = f"{LAYERS}{index}."
            state = qwen2.layer_state(source, prefix)
            for name, tensor in state.items():
                llm.check_range(
                    (prefix + name).removeprefix(PREFIX), tensor, self.options.llm.dtype
                )
            yield prefix, state

    def formats(self, prefix: str) -> Formats:
        return {name: self.scheme[prefix + name] for name in MATRICES}

    def save(self, prefix: str, finished: StoredArrays) -> llm.Ready:
        file = self.directory / f"{prefix}safetensors"
        mx.save_safetensors(str(file), dict(_named(prefix, finished)))
        return dict.fromkeys((prefix + name for name in finished), file)


def first_states(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    references: Sequence[Reference],
    weights: Weights,
) -> list[HiddenStates]:
    """Embed the dialogue of each image: the hidden states that the first layer reads.

    Args:
        weights: where the embedding and the projector come from.
    """
    rotary = qwen2.rotary_embedding(checkpoint.config.text)
    dialogues = dialogues_of(tokenizer.tokenizer, tokenizer.image_token_id, references)
    samples = []
    for dialogue, reference in zip(dialogues, references, strict=True):
        features = torch.from_numpy(reference.features)
        hidden = qwen2.embed(qwen2.Side(weights, features), dialogue)
        rotation = rotary(hidden, dialogue.positions[None])
        around = {"attention_mask": dialogue.mask, "position_embeddings": rotation}
        samples.append(HiddenStates(hidden, around, dialogue.scored))
    return samples


def inputs_of(layer: nn.Module, samples: Sequence[HiddenStates]) -> dict[str, list[Tensor]]:
    """Record the inputs [L, C] of the matrices of `READS`, for each sample."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in READS.values()}
    with recorded(layer, inputs):
        for sample in samples:
            layer(sample.hidden, **sample.around)
    return inputs


class recorded:  # noqa: N801  a context manager, used as a function
    """Record what each matrix of a layer is multiplied with, as long as the context lasts."""

    def __init__(self, layer: nn.Module, inputs: Mapping[str, list[Tensor]]):
        self._hooks = [
            layer.get_submodule(name).register_forward_pre_hook(self._keep(found))
            for name, found in inputs.items()
        ]

    @staticmethod
    def _keep(found: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found.append(arguments[0].flatten(0, -2))

        return hook

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _named(prefix: str, finished: StoredArrays) -> Iterator[tuple[str, mx.array]]:
    """The arrays of each tensor, one or a quantized weight's three, under a bundle's names."""
    for name, arrays in finished.items():
        names = [prefix + name]
        if len(arrays) > 1:
            stem = prefix + name.removesuffix("weight")
            names += [stem + "scales", stem + "biases"]
        yield from zip(names, arrays, strict=True)
