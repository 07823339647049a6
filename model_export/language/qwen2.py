"""Qwen2 in torch, a layer at a time: what the LLM's gate runs on both sides.

The layers are transformers', in float32, so neither side is MLX and the source's side is not
ours. One matrix is resident at a time, of the embedding and the head a block of rows; a bundle's
packed integers are unpacked here, by MLX's documented layout and not by its kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from typing import Protocol

import mlx.core as mx
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from fastvlm_mlx.bundle.bundle import Bundle, model_name
from fastvlm_mlx.bundle.config import TextConfig
from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.language.prompt import encode_prompt
from model_export.checkpoint.checkpoint import Checkpoint, to_torch
from model_export.checkpoint.names import EMBEDDING, HEAD, LAYER, NORM
from model_export.checkpoint.tensors import ALL, SourceTensor, row_blocks, safe_tensors

LAYER_NAMES = tuple(name for name, _ in LAYER)
# The sixteen numbers of E2M1, OCP Microscaling Formats 1.0, 5.3.3.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_E2M1 = torch.cat([_E2M1, -_E2M1])


@dataclass(frozen=True)
class Matrix:
    """A weight as stored: as it is, or MLX's quantized form (words of codes, scales, biases)."""

    weight: SourceTensor
    scales: SourceTensor | None = None
    biases: SourceTensor | None = None
    form: Format | None = None

    def float(self, rows: slice = ALL) -> Tensor:
        """float32, whole or the chosen rows."""
        weight = self.weight.read(rows)
        if self.form is None or self.scales is None:
            return to_torch(weight).float()
        biases = None if self.biases is None else self.biases.read(rows)
        return dequantize(self.form, weight, self.scales.read(rows), biases)

    def blocks(self) -> Iterator[Tensor]:
        """float32, all of it, some rows at a time."""
        return (self.float(rows) for rows in row_blocks(self.weight.shape))


def dequantize(
    form: Format, words: mx.array, scales: mx.array, biases: mx.array | None = None
) -> Tensor:
    """What `mx.quantize` made, float32."""
    packed = to_torch(words.view(mx.uint8))
    if form.mode == "mxfp8":
        codes = packed.view(torch.float8_e4m3fn).float()
    else:
        codes = unpack(packed, form.bits)
        codes = codes.float() if form.mode == "affine" else _E2M1[codes.int()]
    factors = to_torch(scales)
    # One byte each: exponents (OCP MX's E8M0), or for nvfp4 float8 (E4M3).
    if form.mode in ("mxfp4", "mxfp8"):
        factors = torch.exp2(factors.float() - 127)
    elif form.mode == "nvfp4":
        factors = factors.view(torch.float8_e4m3fn)
    grouped = codes.view(*factors.shape, -1).mul_(factors.float()[..., None])
    if biases is not None:
        grouped.add_(to_torch(biases).float()[..., None])
    return grouped.view(codes.shape)


def rounded(weight: Tensor, form: Format) -> Tensor:
    """A float32 weight as MLX's quantization keeps it."""
    return dequantize(form, *mx.quantize(mx.array(weight.numpy()), **asdict(form)))


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
        return Matrix(self._checkpoint.tensors[self._sources[name]])


class BundleWeights:
    def __init__(self, bundle: Bundle):
        self._bundle = bundle
        self._tensors = {
            model_name(name): tensor
            for file in bundle.weight_files
            for name, tensor in safe_tensors(file).items()
        }

    def matrix(self, name: str) -> Matrix:
        weight, stem = self._tensors[name], name.removesuffix("weight")
        form = self._bundle.format_of(stem[:-1])
        if form is None or stem + "scales" not in self._tensors:
            return Matrix(weight)
        biases = self._tensors[stem + "biases"] if form.mode == "affine" else None
        return Matrix(weight, self._tensors[stem + "scales"], biases, form)


@dataclass(frozen=True)
class Dialogue:
    """One image and several questions with their answers, in one sequence.

    Each question is a branch: it sees the system prompt, the image and itself, at the positions
    it would have alone. One pass over the image serves them all, and no answer reads another.

    Attributes:
        ids: [L]. positions: [L]. visible: bool [L, L], row may attend to column.
        scored: the places whose next token belongs to an answer.
        answers: for each question the slice of `scored` that is its answer's, the end's included.
        image: the slice of the placeholders.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    scored: Tensor
    answers: tuple[slice, ...]
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
        pairs = [(prompt, encode_text(tokenizer, answer)) for prompt, answer in questions]
        return cls.of_ids(tokenizer, pairs, image_token_id, num_image_tokens)

    @classmethod
    def of_ids(
        cls,
        tokenizer: Tokenizer,
        questions: Sequence[tuple[str, Sequence[int]]],
        image_token_id: int,
        num_image_tokens: int,
    ) -> Dialogue:
        """`questions` are pairs of a prompt and an answer's ids."""
        ids: list[int] = []
        positions: list[int] = []
        branch: list[int] = []
        scored: list[int] = []
        answers: list[slice] = []
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
            tail = [*asked[end:], *answer]
            answers.append(slice(len(scored), len(scored) + len(answer) + 1))
            scored += range(len(ids) + len(asked) - end - 1, len(ids) + len(tail))
            ids += tail
            positions += range(end, end + len(tail))
            branch += [number] * len(tail)
        tokens = torch.tensor(ids)
        # The encoder's features stand there, and not every model has the placeholder's row.
        tokens[start:end] = tokens[0]
        of = torch.tensor(branch)
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        visible = causal & ((of[None] == 0) | (of[None] == of[:, None]))
        return cls(
            tokens,
            torch.tensor(positions),
            visible,
            torch.tensor(scored),
            tuple(answers),
            slice(start, end),
        )


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an answer, without anything before or after it."""
    return tokenizer.encode(text, add_special_tokens=False).ids


@dataclass(frozen=True)
class Side:
    """One of the models compared: its weights, and what the encoder of its side sees.

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
        """KL divergence from `source` at each scored place, in nats: [P]."""
        expected = source.log_probabilities
        return (expected.exp() * (expected - self.log_probabilities)).sum(1)


@torch.inference_mode()
def run(config: TextConfig, dialogue: Dialogue, sides: Sequence[Side]) -> list[Outcome]:
    """All sides through the whole model in step, each layer's weights read once per side.

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
    """transformers' layer, without weights: one layer's after the other's are put into it."""
    with torch.device("meta"):
        return Qwen2DecoderLayer(_settings(config), 0)


def layer_state(
    weights: Weights, prefix: str, names: Iterable[str] = LAYER_NAMES
) -> dict[str, Tensor]:
    """Tensors of the layer whose names begin so, float32."""
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
    """float32 [1, L, D]: what the first layer reads."""
    embedded = look_up(side.weights.matrix(EMBEDDING[1]), dialogue.ids)
    embedded[dialogue.image] = project(side)
    return embedded[None]


def look_up(matrix: Matrix, ids: Tensor) -> Tensor:
    """Rows of an embedding by ids [L], float32: those alone are read."""
    wanted, places = ids.unique(return_inverse=True)
    return torch.cat([matrix.float(slice(i, i + 1)) for i in wanted.tolist()])[places]


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
    return torch.cat([hidden @ rows.T for rows in head.blocks()], 1).log_softmax(1)
