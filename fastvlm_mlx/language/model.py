"""The MLX side of FastVLM: the projector, and mlx-lm's Qwen2."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from importlib.util import find_spec
from math import sqrt
from threading import Lock
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import FastVLMConfig
from fastvlm_mlx.errors import BundleError
from fastvlm_mlx.imports import part
from fastvlm_mlx.language.prompt.template import image_places

if TYPE_CHECKING:
    from fastvlm_mlx.language.cpu.qwen2 import TorchModel

qwen2 = part("mlx_lm.models.qwen2")

_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.")


class MultiModalProjector(nn.Module):
    """Encoder features [1, N, C] → language model's embeddings [1, N, D]."""

    def __init__(self, config: FastVLMConfig):
        super().__init__()
        hidden = config.text.hidden_size
        self.linear_0 = nn.Linear(config.vision.hidden_size, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def __call__(self, features: mx.array) -> mx.array:
        x = self.linear_0(features)
        # nn.gelu halves last, which overflows from half of float16's range on.
        return self.linear_2(0.5 * x * (1 + mx.erf(x * sqrt(0.5))))


class LanguageModel(qwen2.Model):  # type: ignore[name-defined]
    """mlx-lm's Qwen2, which with a cache computes the logits of the last place alone."""

    def __call__(
        self,
        inputs: mx.array,
        cache: Any = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        hidden = self.model(inputs, cache, input_embeddings)
        if cache is not None:
            hidden = hidden[:, -1:]
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)


class Model(nn.Module):
    """Parameters under an `app` bundle's names: `language_model.*`, `multi_modal_projector.*`."""

    def __init__(self, config: FastVLMConfig):
        super().__init__()
        self.config = config
        text = config.text
        self.language_model = LanguageModel(
            qwen2.ModelArgs(
                model_type="qwen2",
                hidden_size=text.hidden_size,
                num_hidden_layers=text.num_hidden_layers,
                intermediate_size=text.intermediate_size,
                num_attention_heads=text.num_attention_heads,
                num_key_value_heads=text.num_key_value_heads,
                rms_norm_eps=text.rms_norm_eps,
                vocab_size=text.vocab_size,
                max_position_embeddings=text.max_position_embeddings,
                rope_theta=text.rope_theta,
                tie_word_embeddings=text.tie_word_embeddings,
            )
        )
        self.multi_modal_projector = MultiModalProjector(config)

    # A call returns before its result is computed.
    lazy = True

    @property
    def compute(self) -> str:
        """What computes, and in which type between the matrices."""
        # The bias's: a quantized weight is of integers.
        dtype = self.multi_modal_projector.linear_0.bias.dtype
        return f"MLX {str(dtype).removeprefix('mlx.core.')}"

    @property
    def parameter_count(self) -> int:
        """Of the language model, quantized or not."""
        text = self.config.text
        width, kv = text.hidden_size, text.num_key_value_heads
        head_dim = width // text.num_attention_heads
        layer = 2 * width * (width + kv * head_dim) + 3 * width * text.intermediate_size
        embeddings = text.vocab_size * width * (1 if text.tie_word_embeddings else 2)
        return text.num_hidden_layers * layer + embeddings

    def project(self, features: mx.array) -> mx.array:
        """float32 [1, N, C] → [N, D] in the model's dtype."""
        # The bias's: a quantized weight is of integers.
        dtype = self.multi_modal_projector.linear_0.bias.dtype
        return self.multi_modal_projector(features.astype(dtype))[0]

    def embed_inputs(self, ids: mx.array, *images: mx.array) -> mx.array:
        """Embed ids [L] and put the rows of each of `images` [N, D] where its placeholders stand.

        The placeholders of an image are one run of N, so the rows are spliced and not gathered.
        """
        # Some quantized modes dequantize to bfloat16, whatever the model computes in.
        dtype = self.multi_modal_projector.linear_0.bias.dtype
        embeddings = self.language_model.model.embed_tokens(ids).astype(dtype)
        pieces, end = [], 0
        lengths = [image.shape[0] for image in images]
        found = image_places(np.asarray(ids).tolist(), self.config.image_token_index, lengths)
        for image, place in zip(images, found, strict=True):
            pieces += [embeddings[end : place.start], image.astype(dtype)]
            end = place.stop
        return mx.concatenate([*pieces, embeddings[end:]]) if pieces else embeddings


def load_model(bundle: Bundle, weights: dict[str, mx.array] | None = None) -> Model:
    """The bundle's projector and language model, quantized where its weights are.

    Weights are read when first used, unless they are given. On a CPU MLX's kernel fusion is turned
    off, for the whole process.

    Raises:
        BundleError: a weight is missing, unknown or of the wrong shape.
    """
    weights = bundle.model_tensors() if weights is None else weights
    _check_layers(bundle, weights)
    model = Model(bundle.config)
    if bundle.config.quantization is not None:

        def quantized(path: str, _: nn.Module) -> bool | dict[str, Any]:
            stored = bundle.format_of(path) if f"{path}.scales" in weights else None
            return False if stored is None else asdict(stored)

        nn.quantize(model, class_predicate=quantized)
    _check_names(bundle, dict(tree_flatten(model.parameters())), weights)
    model.load_weights(list(weights.items()))
    if mx.default_device() == mx.Device(mx.cpu):
        # Fused kernels are C++ that MLX hands to the system's compiler at their first use: half a
        # second each, and no answer on a machine that has none.
        mx.disable_compile()
    model.eval()
    return model


def for_this_machine(model: Model) -> RunningModel:
    """The model as this machine runs it: on a CPU in torch, unless that is a Mac's; else in MLX.

    Args:
        model: its arrays are in memory.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return model
    if sys.platform == "darwin" or find_spec("torch") is None:
        # MLX's half-precision kernels for a CPU are an order of magnitude slower and no more exact.
        model.set_dtype(mx.float32)
        return model
    return CPUModel(model)


class CPUModel:
    """What `Model` does, on a CPU in torch, which is imported and filled at the first use."""

    lazy = False

    def __init__(self, model: Model):
        self.config = model.config
        self.multi_modal_projector = model.multi_modal_projector
        self._filling = Lock()
        self._held: Model | TorchModel = model

    @property
    def _torch(self) -> TorchModel:
        from fastvlm_mlx.language.cpu.qwen2 import TorchModel, arithmetic

        with self._filling:
            if not isinstance(self._held, TorchModel):
                # In its place no sooner than it is whole: what fails or is interrupted is tried
                # again by the next use.
                self._held = TorchModel(self._held, arithmetic(self._held.parameter_count))
            return self._held

    @property
    def language_model(self) -> Any:
        return self._torch.language_model

    @property
    def compute(self) -> str:
        """What computes, and in which type the matrices are multiplied."""
        return self._torch.compute

    def project(self, features: mx.array) -> mx.array:
        """float32 [1, N, C] → [N, D] in float32."""
        return self._torch.project(features)

    def embed_inputs(self, ids: mx.array, *images: mx.array) -> mx.array:
        """As `Model.embed_inputs`, in float32."""
        return self._torch.embed_inputs(ids, *images)


RunningModel = Model | CPUModel


def _check_layers(bundle: Bundle, weights: dict[str, mx.array]) -> None:
    """Before a model is built, that it has as many layers as the weights, and not a million."""
    found = {match.group(1) for name in weights if (match := _LAYER.match(name))}
    expected = bundle.config.text.num_hidden_layers
    if len(found) != expected:
        raise BundleError(
            f"{bundle.path} holds {len(found)} layers where config.json says num_hidden_layers "
            f"{expected}: export the checkpoint again"
        )


def _check_names(bundle: Bundle, expected: dict[str, mx.array], held: dict[str, mx.array]) -> None:
    for name in sorted(expected.keys() | held.keys()):
        if name not in held:
            raise BundleError(
                f"{bundle.path} lacks {name}: expected it for the model that config.json "
                "describes, export the checkpoint again"
            )
        if name not in expected:
            raise BundleError(
                f"{bundle.path} holds {name}, which is no weight of the model that config.json "
                "describes: remove the file it came with, or export the checkpoint again"
            )
        if expected[name].shape != held[name].shape:
            raise BundleError(
                f"{name} has shape {list(held[name].shape)} where config.json implies "
                f"{list(expected[name].shape)}: export the checkpoint again"
            )
