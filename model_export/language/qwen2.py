"""Qwen2 in torch, a layer at a time: the language model that both sides of a comparison run.

The layers are transformers', in float32, so neither side is MLX and the source's side is not
ours. One matrix is resident at a time; of the embedding and the head it is a block of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm_mlx.bundle.config import TextConfig
from model_export.checkpoint.names import EMBEDDING, HEAD, LAYER, NORM
from model_export.language.dialogue import Dialogue
from model_export.language.weights import Matrix, Weights

if TYPE_CHECKING:
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

LAYER_NAMES = tuple(name for name, _ in LAYER)


@dataclass(frozen=True)
class Side:
    """One of the models compared: its weights, and the features of one image that it reads.

    Attributes:
        config: its own, where it may be another than the one that all run under.
    """

    weights: Weights
    features: Tensor
    config: TextConfig | None = None


@dataclass(frozen=True)
class Outcome:
    """Log-probabilities of the next token at the scored places [P, V], and the largest magnitude
    that the residual stream reaches."""

    log_probabilities: Tensor
    largest: float

    def divergence(self, source: Outcome) -> Tensor:
        """Compute the KL divergence from `source` at each scored place, in nats: [P]."""
        expected = source.log_probabilities
        return (expected.exp() * (expected - self.log_probabilities)).sum(1)


@torch.inference_mode()
def run(config: TextConfig, dialogue: Dialogue, sides: Sequence[Side]) -> list[Outcome]:
    """Run all sides through the whole model in step; each layer's weights are read once per side.

    Args:
        config: of the sides that have none of their own.
    """
    configs = [side.config or config for side in sides]
    hidden = [embed(side, dialogue) for side in sides]
    largest = [float(h.abs().max()) for h in hidden]
    cos_sin = [
        rotary_embedding(own)(h, dialogue.positions[None])
        for own, h in zip(configs, hidden, strict=True)
    ]
    for index in range(config.num_hidden_layers):
        for i, side in enumerate(sides):
            layer = _layer(configs[i], side.weights, f"language_model.model.layers.{index}.")
            around = {"attention_mask": dialogue.mask, "position_embeddings": cos_sin[i]}
            hidden[i] = layer(hidden[i], **around)
            largest[i] = float(np.maximum(largest[i], float(hidden[i].abs().max())))
    return [
        Outcome(_log_probabilities(side, h[0, dialogue.scored], own), peak)
        for side, h, own, peak in zip(sides, hidden, configs, largest, strict=True)
    ]


def decoder_layer(config: TextConfig) -> Qwen2DecoderLayer:
    """Make transformers' layer without weights; those of one layer after the other go into it."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    with torch.device("meta"):
        return Qwen2DecoderLayer(_settings(config), 0)


def layer_state(
    weights: Weights, prefix: str, names: Iterable[str] = LAYER_NAMES
) -> dict[str, Tensor]:
    """Read the float32 tensors of the layer whose names begin with `prefix`."""
    return {name: weights.matrix(prefix + name).float() for name in names}


def replace_weight(layer: nn.Module, key: str, weight: Tensor) -> None:
    """Put another tensor of the same shape where the layer holds `key`.

    Raises:
        AttributeError: the layer holds no such parameter. ValueError: its shape is another.
    """
    if layer.get_parameter(key).shape != weight.shape:
        raise ValueError(f"{key} can't become {list(weight.shape)}")
    owner, _, name = key.rpartition(".")
    setattr(layer.get_submodule(owner), name, nn.Parameter(weight, requires_grad=False))


def rotary_embedding(config: TextConfig) -> Qwen2RotaryEmbedding:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    return Qwen2RotaryEmbedding(_settings(config))


def _layer(config: TextConfig, weights: Weights, prefix: str) -> Qwen2DecoderLayer:
    """A layer each of whose modules reads its weights when it runs, and lets go of them then."""
    layer = decoder_layer(config)

    def read(name: str, module: nn.Module, arguments: object) -> None:
        state = {
            key: weights.matrix(f"{prefix}{name}.{key}").float() for key in module.state_dict()
        }
        module.load_state_dict(state, strict=True, assign=True)

    def let_go(module: nn.Module, arguments: object, result: object) -> None:
        module.to("meta")

    for name, module in layer.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(partial(read, name))
            module.register_forward_hook(let_go)
    return layer


def _settings(config: TextConfig) -> Qwen2Config:
    from transformers import Qwen2Config

    settings = Qwen2Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    settings._attn_implementation = "sdpa"
    return settings


def embed(side: Side, dialogue: Dialogue) -> Tensor:
    """Embed a dialogue: float32 [1, L, D], what the first layer reads."""
    embedded = look_up(side.weights.matrix(EMBEDDING[1]), dialogue.ids)
    embedded[dialogue.image] = project(side)
    return embedded[None]


def look_up(matrix: Matrix, ids: Tensor) -> Tensor:
    """Read the rows of an embedding by ids [L], in float32, and no others."""
    wanted, places = ids.unique(return_inverse=True)
    return torch.cat([matrix.float(slice(i, i + 1)) for i in wanted.tolist()])[places]


def project(side: Side) -> Tensor:
    """Project float32 features [1, N, C] → [N, D]: Linear, exact GELU, Linear."""

    def linear(x: Tensor, name: str) -> Tensor:
        stem = f"multi_modal_projector.{name}"
        weight, bias = (
            side.weights.matrix(f"{stem}.{part}").float() for part in ("weight", "bias")
        )
        return F.linear(x, weight, bias)

    return linear(F.gelu(linear(side.features[0], "linear_0")), "linear_2")


def _log_probabilities(side: Side, hidden: Tensor, config: TextConfig) -> Tensor:
    norm = side.weights.matrix(NORM[1]).float()
    hidden = F.rms_norm(hidden, (config.hidden_size,), norm, config.rms_norm_eps)
    head = side.weights.matrix((EMBEDDING if config.tie_word_embeddings else HEAD)[1])
    return torch.cat([hidden @ rows.T for rows in head.blocks()], 1).log_softmax(1)
