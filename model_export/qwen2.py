"""Qwen2 in torch, a layer at a time: what the LLM's gate runs on both sides.

The layers are transformers', in float32, so neither side is MLX and the source's side is not
ours. One layer's weights are resident at a time; a bundle's packed integers are unpacked here,
by MLX's documented layout and not by its kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

import mlx.core as mx
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.config import TextConfig
from fastvlm_mlx.prompt import encode_prompt
from fastvlm_mlx.quantization import Format
from model_export.checkpoint import Checkpoint, to_torch
from model_export.weights import EMBEDDING, HEAD, LAYER, NORM

ROWS = 16_384
# The sixteen numbers of E2M1, OCP Microscaling Formats 1.0, 5.3.3.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_E2M1 = torch.cat([_E2M1, -_E2M1])


@dataclass(frozen=True)
class Matrix:
    """A weight as stored: as it is, or MLX's quantized form (bytes of codes, scales, biases)."""

    weight: Tensor
    scales: Tensor | None = None
    biases: Tensor | None = None
    form: Format | None = None

    def __len__(self) -> int:
        return self.weight.shape[0]

    def float(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """float32, whole or the chosen rows."""
        if self.form is None or self.scales is None:
            return self.weight[rows].float()
        if self.form.mode == "mxfp8":
            codes = self.weight[rows].view(torch.float8_e4m3fn).float()
        else:
            codes = unpack(self.weight[rows], self.form.bits)
            codes = codes.float() if self.form.mode == "affine" else _E2M1[codes.int()]
        scales = self.scales[rows]
        # One byte each: exponents (OCP MX's E8M0), or for nvfp4 float8 (E4M3).
        if self.form.mode in ("mxfp4", "mxfp8"):
            scales = torch.exp2(scales.float() - 127)
        elif self.form.mode == "nvfp4":
            scales = scales.view(torch.float8_e4m3fn)
        grouped = codes.view(*scales.shape, -1).mul_(scales.float()[..., None])
        if self.biases is not None:
            grouped.add_(self.biases[rows].float()[..., None])
        return grouped.view(codes.shape)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Little-endian words [rows, k], as uint8 [rows, 4k], → uint8 codes [rows, 32k / bits].

    Codes lie end to end from the lowest bit, so `bits` bytes hold eight of them, each in one byte
    or across two.
    """
    data = words.reshape(words.shape[0], -1, bits)
    codes = torch.empty((*data.shape[:2], 8), dtype=torch.uint8)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        code = data[..., byte] >> shift
        if shift + bits > 8:
            code |= data[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[..., i])
    return codes.view(words.shape[0], -1)


class Weights(Protocol):
    """Where one side's weights come from, by their names in a bundle."""

    def matrix(self, name: str) -> Matrix: ...


class SourceWeights:
    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._sources = {spec.name: spec.source for spec in checkpoint.llm_specs}

    def matrix(self, name: str) -> Matrix:
        return Matrix(to_torch(self._checkpoint.array(self._sources[name])))


class BundleWeights:
    def __init__(self, bundle: Bundle):
        self._bundle = bundle
        self._names = frozenset(bundle.model_tensors())

    def matrix(self, name: str) -> Matrix:
        stem = name.removesuffix("weight")
        form = self._bundle.format_of(stem[:-1])
        if form is None or stem + "scales" not in self._names:
            return Matrix(to_torch(self._load(name)))
        words = to_torch(self._load(name).view(mx.uint8))
        scales = to_torch(self._load(stem + "scales"))
        biases = to_torch(self._load(stem + "biases")) if form.mode == "affine" else None
        return Matrix(words, scales, biases, form)

    def _load(self, name: str) -> mx.array:
        return self._bundle.model_tensors()[name]


@dataclass(frozen=True)
class Dialogue:
    """One picture and several questions with their answers, in one sequence.

    Each question is a branch: it sees the system prompt, the picture and itself, at the positions
    it would have alone. One pass over the picture serves them all, and no answer reads another.

    Attributes:
        ids: [L]. positions: [L]. visible: bool [L, L], row may attend to column.
        scored: the places whose next token belongs to an answer.
        image: the slice of the placeholders.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    scored: Tensor
    image: slice

    @property
    def mask(self) -> Tensor:
        """What is added to the attention's scores: float32 [1, 1, L, L]."""
        return torch.zeros(self.visible.shape).masked_fill(~self.visible, -inf)[None, None]

    @classmethod
    def build(
        cls,
        tokenizer: Tokenizer,
        questions: Sequence[tuple[str, str]],
        image_token_id: int,
        num_image_tokens: int,
    ) -> Dialogue:
        """`questions` are pairs of prompt and answer."""
        ids: list[int] = []
        positions: list[int] = []
        branch: list[int] = []
        scored: list[int] = []
        for number, (prompt, answer) in enumerate(questions, 1):
            asked = encode_prompt(
                tokenizer,
                prompt,
                image_token_id=image_token_id,
                num_image_tokens=num_image_tokens,
            )
            start = asked.index(image_token_id)
            end = start + num_image_tokens
            if not ids:
                ids, positions, branch = asked[:end], list(range(end)), [0] * end
            tail = asked[end:] + tokenizer.encode(answer, add_special_tokens=False).ids
            scored += range(len(ids) + len(asked) - end - 1, len(ids) + len(tail))
            ids += tail
            positions += range(end, end + len(tail))
            branch += [number] * len(tail)
        of = torch.tensor(branch)
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        visible = causal & ((of[None] == 0) | (of[None] == of[:, None]))
        return cls(
            torch.tensor(ids),
            torch.tensor(positions),
            visible,
            torch.tensor(scored),
            slice(start, end),
        )


@dataclass(frozen=True)
class Side:
    """One of the two models compared: its weights, and what the encoder of its side sees."""

    weights: Weights
    features: Tensor


@dataclass(frozen=True)
class Outcome:
    """Log-probabilities of the next token at the scored places [P, V], and the largest magnitude
    that the residual stream reaches."""

    log_probabilities: Tensor
    largest: float


@torch.inference_mode()
def run(config: TextConfig, dialogue: Dialogue, sides: Sequence[Side]) -> list[Outcome]:
    """Both sides through the whole model in step, each layer's weights read once per side."""
    rotary, layer = rotary_embedding(config), decoder_layer(config)
    hidden = [_embed(side, dialogue) for side in sides]
    largest = [float(h.abs().max()) for h in hidden]
    cos_sin = rotary(hidden[0], dialogue.positions[None])
    for index in range(config.num_hidden_layers):
        for i, side in enumerate(sides):
            state = {
                name: side.weights.matrix(f"language_model.model.layers.{index}.{name}").float()
                for name, _ in LAYER
            }
            layer.load_state_dict(state, strict=True, assign=True)
            hidden[i] = layer(hidden[i], attention_mask=dialogue.mask, position_embeddings=cos_sin)
            largest[i] = float(np.maximum(largest[i], float(hidden[i].abs().max())))
    return [
        Outcome(_log_probabilities(side, h[0, dialogue.scored], config), peak)
        for side, h, peak in zip(sides, hidden, largest, strict=True)
    ]


def decoder_layer(config: TextConfig) -> Qwen2DecoderLayer:
    """transformers' layer, without weights: one layer's after the other's are put into it."""
    with torch.device("meta"):
        return Qwen2DecoderLayer(_settings(config), 0)


def rotary_embedding(config: TextConfig) -> Qwen2RotaryEmbedding:
    return Qwen2RotaryEmbedding(_settings(config))


def _settings(config: TextConfig) -> Qwen2Config:
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


def _embed(side: Side, dialogue: Dialogue) -> Tensor:
    embedded = side.weights.matrix(EMBEDDING[1]).float(dialogue.ids)
    embedded[dialogue.image] = project(side)
    return embedded[None]


def project(side: Side) -> Tensor:
    """float32 [1, N, C] → [N, D]: Linear, exact GELU, Linear."""

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
    logits = [hidden @ head.float(slice(i, i + ROWS)).T for i in range(0, len(head), ROWS)]
    return torch.cat(logits, 1).log_softmax(1)
