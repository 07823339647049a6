"""Projector and Qwen2 in torch, for machines without a GPU that MLX knows.

It takes the place of mlx-lm's model behind the interface that `generate_step` and `BatchGenerator`
expect, `model(ids, cache=, input_embeddings=) → logits`, so that everything above is the same on
every machine. Between the products everything is float32.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.bundle.config import FastVLMConfig
from fastvlm_mlx.language.cpu.cache import BatchKVCache, KVCache
from fastvlm_mlx.language.cpu.matrix import Arithmetic, Matrix, as_torch, matrix
from fastvlm_mlx.language.prompt.template import image_places

if TYPE_CHECKING:
    from torch import Tensor

    from fastvlm_mlx.language.model import Model

# A model with fewer parameters is as fast in float32.
SMALL = 50_000_000
# Of this machine's memory, what dequantized weights may take for the sake of speed.
DENSE_SHARE = 0.25


def arithmetic(parameters: int) -> Arithmetic:
    """What this CPU does well: bfloat16 where it multiplies that natively."""
    import torch

    if parameters < SMALL:
        return Arithmetic(torch.float32, packed=False, keep_dense=True)
    if platform.machine() == "x86_64":
        native = torch.cpu._is_avx512_bf16_supported()
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = torch.bfloat16 if native else torch.float32
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Arithmetic(
        dtype,
        # The kernel's other forms are reference loops.
        packed=torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"),
        keep_dense=parameters * dtype.itemsize <= DENSE_SHARE * memory,
    )


@dataclass(frozen=True)
class _Layer:
    input_layernorm: Tensor
    qkv: tuple[Matrix, ...]
    o_proj: Matrix
    post_attention_layernorm: Tensor
    gate_up: tuple[Matrix, ...]
    down_proj: Matrix


class Qwen2:
    """The language model of a bundle whose arrays `model` has in memory."""

    def __init__(self, model: Model, numbers: Arithmetic):
        import torch

        text, qwen2 = model.config.text, model.language_model
        self.arithmetic = numbers
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = text.hidden_size // text.num_attention_heads
        self.eps = text.rms_norm_eps
        exponents = torch.arange(0, self.head_dim, 2).double() / self.head_dim
        self.frequencies = (text.rope_theta**-exponents).float()
        self.embed_tokens = matrix([qwen2.model.embed_tokens], numbers)
        self.layers = [self._layer(layer) for layer in qwen2.model.layers]
        self.norm = as_torch(qwen2.model.norm.weight).float()
        self.lm_head = (
            self.embed_tokens if text.tie_word_embeddings else matrix([qwen2.lm_head], numbers)
        )

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            as_torch(layer.input_layernorm.weight).float(),
            self._joined(attention.q_proj, attention.k_proj, attention.v_proj),
            matrix([attention.o_proj], self.arithmetic),
            as_torch(layer.post_attention_layernorm.weight).float(),
            self._joined(mlp.gate_proj, mlp.up_proj),
            matrix([mlp.down_proj], self.arithmetic),
        )

    def _joined(self, *modules: Any) -> tuple[Matrix, ...]:
        """One product for all where they are stored alike."""
        forms = {
            tuple(getattr(module, name, None) for name in ("bits", "group_size", "mode"))
            for module in modules
        }
        if len(forms) == 1:
            return (matrix(modules, self.arithmetic),)
        return tuple(matrix([module], self.arithmetic) for module in modules)

    def make_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.layers]

    def __call__(
        self,
        inputs: mx.array,
        cache: Sequence[KVCache | BatchKVCache] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Ids [B, L], or their embeddings [B, L, D] → logits, float32.

        Without a cache of every place, [B, L, V]; with one of the last alone, [B, 1, V].
        """
        import torch

        with torch.inference_mode():
            if input_embeddings is None:
                x = self.embed(np.asarray(inputs))
            else:
                x = torch.from_numpy(np.array(input_embeddings.astype(mx.float32)))
            hidden = self._hidden(x, cache or [BatchKVCache.of(len(x)) for _ in self.layers])
            hidden = hidden if cache is None else hidden[:, -1:]
            return mx.array(self.lm_head(self._normed(hidden, self.norm)).numpy())

    def embed(self, ids: np.ndarray) -> Tensor:
        """Ids [...] → float32 [..., D]."""
        import torch

        rows = self.embed_tokens.rows(torch.from_numpy(ids.astype(np.int64).reshape(-1)))
        return rows.view(*ids.shape, -1)

    def _hidden(self, x: Tensor, cache: Sequence[KVCache | BatchKVCache]) -> Tensor:
        import torch
        import torch.nn.functional as F

        starts = torch.tensor([sequence.offset for sequence in cache[0].sequences])
        places = starts[:, None, None, None] + torch.arange(x.shape[1])[:, None]
        angles = places * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        for layer, kept in zip(self.layers, cache, strict=True):
            x = x + self._attention(layer, x, kept, cos, sin)
            normed = self._normed(x, layer.post_attention_layernorm)
            gate, up = _products(layer.gate_up, normed).chunk(2, -1)
            x = x + layer.down_proj(F.silu(gate) * up)
        return x

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _attention(
        self, layer: _Layer, x: Tensor, cache: KVCache | BatchKVCache, cos: Tensor, sin: Tensor
    ) -> Tensor:
        import torch

        batch, length = x.shape[:2]
        normed = self._normed(x, layer.input_layernorm)
        # [B, heads, L, width]
        qkv = _products(layer.qkv, normed).view(batch, length, -1, self.head_dim).transpose(1, 2)
        queries, keys, values = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        queries, keys = _rotated(queries, cos, sin), _rotated(keys, cos, sin)
        out = [
            self._attended(queries[i], *sequence.update_and_fetch(keys[i], values[i]))
            for i, sequence in enumerate(cache.sequences)
        ]
        return layer.o_proj(torch.stack(out) if batch > 1 else out[0][None])

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One sequence: [heads, L, width], and all places so far → [L, heads · width]."""
        import torch
        import torch.nn.functional as F

        length, width = queries.shape[1:]
        # Queries that share keys and values lie beside each other: [kv heads, shared · L, width].
        shared = self.heads // self.kv_heads
        if length == 1:
            grouped = queries.reshape(self.kv_heads, shared, width)
            out = F.scaled_dot_product_attention(grouped[None], keys[None], values[None])[0]
            return out.reshape(1, -1)
        keys, values = (t.repeat_interleave(shared, 0) for t in (keys, values))
        places = keys.shape[1]
        mask = None
        if places > length:
            mask = torch.ones(length, places, dtype=torch.bool).tril(places - length)
        out = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None
        )[0]
        return out.transpose(0, 1).reshape(length, -1)


class TorchModel:
    """Projector and language model from the arrays of `model`, which are in memory."""

    lazy = False

    def __init__(self, model: Model, numbers: Arithmetic):
        import torch

        self.config: FastVLMConfig = model.config
        self.multi_modal_projector = model.multi_modal_projector
        self.arithmetic = numbers
        self.language_model = Qwen2(model, numbers)
        # The projector is small, and kept as exact as the encoder.
        exact = Arithmetic(torch.float32, packed=False, keep_dense=True)
        projector = model.multi_modal_projector
        self._linear_0 = matrix([projector.linear_0], exact)
        self._linear_2 = matrix([projector.linear_2], exact)

    @property
    def compute(self) -> str:
        """What computes, and in which type the matrices are multiplied."""
        return f"torch {self.arithmetic.name}"

    def project(self, features: mx.array) -> mx.array:
        """float32 [1, N, C] → [N, D] in float32."""
        import torch
        import torch.nn.functional as F

        with torch.inference_mode():
            x = torch.from_numpy(np.array(features[0].astype(mx.float32)))
            return mx.array(self._linear_2(F.gelu(self._linear_0(x))).numpy())

    def embed_inputs(self, ids: mx.array, *images: mx.array) -> mx.array:
        """As `Model.embed_inputs`, in float32."""
        import torch

        with torch.inference_mode():
            embeddings = self.language_model.embed(np.asarray(ids)).numpy()
        lengths = [image.shape[0] for image in images]
        found = image_places(np.asarray(ids).tolist(), self.config.image_token_index, lengths)
        for image, place in zip(images, found, strict=True):
            embeddings[place.start : place.stop] = np.asarray(image)
        return mx.array(embeddings)


def _products(matrices: tuple[Matrix, ...], x: Tensor) -> Tensor:
    import torch

    return torch.cat([m(x) for m in matrices], -1) if len(matrices) > 1 else matrices[0](x)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings of [B, heads, L, width]; a pair is a place and that half the width on."""
    import torch

    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
