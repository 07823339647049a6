"""Measuring many assignments of bits at once: what each loses of the next token's distribution.

Each assignment is a row of a batch that goes through the source's layers, every matrix multiplied
with the rows that have it in the same form. A row is the source itself up to the first layer where
the two differ, and starts there. Resident are one layer's weights, packed in every form that
occurs, and a hidden state for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlm_mlx.bundle.config import TextConfig
from fastvlm_mlx.bundle.quantization import Format
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.names import NORM
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.checkpoint.weights.tensors import row_blocks
from model_export.encoder.references import Reference
from model_export.language import llm, qwen2
from model_export.language.dialogue import Dialogue
from model_export.language.evaluation import dialogues_of
from model_export.language.products import linear
from model_export.language.recipes import EMBEDDING, HEAD, PREFIX, PROJECTOR, Scheme
from model_export.language.weights import SourceWeights, dequantize

# Elements of the widest activation of the rows that go through a layer together.
CHUNK_ELEMENTS = 2**24
# Of logits, beyond which a float32 exponential is infinite.
LARGEST_DIFFERENCE = 80.0

_LAYERS = PREFIX + "model.layers."
_FIRST, _SECOND = PROJECTOR + "linear_0", PROJECTOR + "linear_2"


@dataclass
class _Sample:
    """An image with its questions on its way through the layers.

    Attributes:
        source: [1, L, D], what the next layer reads in the source.
        hidden: [R, L, D], what it reads in each assignment that has begun.
    """

    dialogue: Dialogue
    rotation: tuple[Tensor, Tensor]
    source: Tensor
    hidden: Tensor


@torch.inference_mode()
def divergences(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    references: Sequence[Reference],
    schemes: Sequence[Scheme],
    dtype: str,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Tensor]:
    """Measure the nats that each of `schemes` loses at each place of the answers.

    Args:
        references: images with questions, of any number of image tokens.
        schemes: where one does not name a matrix, or leaves it unquantized, it is the source's.
        dtype: of scales and biases, as a bundle stores them.
        progress: called with the share that is done.

    Returns:
        For each reference float64 [schemes, places].
    """
    text = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    # Those that have begun are the first rows of the batch.
    order = sorted(range(len(schemes)), key=lambda i: _begins(schemes[i]))
    rows = [schemes[i] for i in order]
    source = SourceWeights(checkpoint)
    forms = _Forms(source, dtype)
    dialogues = dialogues_of(tokenizer.tokenizer, tokenizer.image_token_id, references)
    samples = [
        _start(text, dialogue, torch.from_numpy(reference.features), forms, rows)
        for dialogue, reference in zip(dialogues, references, strict=True)
    ]
    layer = _Layer(text, forms)
    begun = 0
    for index in range(text.num_hidden_layers):
        prefix = f"{_LAYERS}{index}."
        layer.load(prefix, source)
        before, begun = (sum(_begins(row) <= n for row in rows) for n in (index - 1, index))
        for sample in samples:
            sample.hidden[before:begun] = sample.source
            sample.source = layer(sample, sample.source, [{}])
            wide = sample.source.shape[1] * text.intermediate_size
            for some in _chunks(begun, wide):
                sample.hidden[some] = layer(sample, sample.hidden[some], rows[some])
        forms.forget()
        progress((index + 1) / (text.num_hidden_layers + 1))
    for sample in samples:
        sample.hidden[begun:] = sample.source
    found = _ends(samples, rows, text, forms)
    progress(1.0)
    result = torch.empty_like(found)
    result[order] = found
    return list(result.split([len(sample.dialogue.scored) for sample in samples], 1))


def means(by_place: Sequence[Tensor]) -> list[float]:
    """Average what `divergences` returns over all places, for each scheme."""
    return torch.cat(list(by_place), 1).mean(1).tolist()


def _begins(scheme: Scheme) -> int:
    """The first layer where it differs from the source; -1 before all of them, else the number
    of a layer beyond any."""
    paths = [path for path, form in scheme.items() if form is not None]
    numbers = [int(p.removeprefix(_LAYERS).split(".")[0]) for p in paths if p.startswith(_LAYERS)]
    if any(path != HEAD and not path.startswith(_LAYERS) for path in paths):
        return -1
    return min(numbers, default=2**31)


def _chunks(count: int, elements: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // elements)
    return (slice(i, min(i + step, count)) for i in range(0, count, step))


class _Forms:
    """The source's matrices in the forms that are asked for, packed once for each layer."""

    def __init__(self, source: SourceWeights, dtype: str):
        self.source, self._dtype = source, dtype
        self._packed: dict[tuple[str, Format], list[mx.array]] = {}

    def forget(self) -> None:
        self._packed.clear()

    def matrix(self, path: str, form: Format | None, weight: Tensor | None = None) -> Tensor:
        """float32 [out, in]. `weight`: the source's, where it is at hand."""
        if weight is None:
            weight = self.source.matrix(f"{path}.weight").float()
        if form is None:
            return weight
        if (path, form) not in self._packed:
            self._packed[path, form] = self._pack(weight, form)
        return dequantize(form, *self._packed[path, form])

    def block(self, path: str, form: Format | None, rows: slice) -> Tensor:
        """float32, some rows of a matrix."""
        return self.rounded(self.source.matrix(f"{path}.weight").float(rows), form)

    def rounded(self, weight: Tensor, form: Format | None) -> Tensor:
        return weight if form is None else dequantize(form, *self._pack(weight, form))

    def _pack(self, weight: Tensor, form: Format) -> list[mx.array]:
        found = llm.finish(mx.array(weight.numpy()), form, self._dtype)
        mx.eval(found)
        return found


class _Several(nn.Module):
    """A matrix of a layer, multiplied with rows that have it in different forms."""

    def __init__(self, forms: _Forms):
        super().__init__()
        self.forms = forms
        self.path = ""
        self.rows: Sequence[Scheme] = ()
        self.weight = torch.empty(0)
        self.bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[R, L, in] → [R, L, out]."""
        places: dict[Format | None, list[int]] = {}
        for i, scheme in enumerate(self.rows):
            places.setdefault(scheme.get(self.path), []).append(i)
        if len(places) == 1:
            weight = self.forms.matrix(self.path, next(iter(places)), self.weight)
            return linear(x, weight, self.bias)
        found = x.new_empty(*x.shape[:-1], len(self.weight))
        for form, some in places.items():
            weight = self.forms.matrix(self.path, form, self.weight)
            found[some] = linear(x[some], weight, self.bias)
        return found


class _Layer:
    """transformers' decoder layer, every matrix of it in several forms."""

    def __init__(self, config: TextConfig, forms: _Forms):
        self._module = qwen2.decoder_layer(config)
        self._matrices: dict[str, _Several] = {}
        names = [n for n, m in self._module.named_modules() if isinstance(m, nn.Linear)]
        for name in names:
            owner, _, attribute = name.rpartition(".")
            self._matrices[name] = _Several(forms)
            setattr(self._module.get_submodule(owner), attribute, self._matrices[name])

    def load(self, prefix: str, source: SourceWeights) -> None:
        state = qwen2.layer_state(source, prefix)
        for name, matrix in self._matrices.items():
            matrix.path = prefix + name
            matrix.weight, matrix.bias = (
                state.pop(f"{name}.weight"),
                state.pop(f"{name}.bias", None),
            )
        self._module.load_state_dict(state, strict=True, assign=True)

    def __call__(self, sample: _Sample, hidden: Tensor, rows: Sequence[Scheme]) -> Tensor:
        for matrix in self._matrices.values():
            matrix.rows = rows
        mask, rotation = sample.dialogue.mask, sample.rotation
        return self._module(hidden, attention_mask=mask, position_embeddings=rotation)


def _start(
    config: TextConfig,
    dialogue: Dialogue,
    features: Tensor,
    forms: _Forms,
    rows: Sequence[Scheme],
) -> _Sample:
    """An image and its questions embedded, as the source has them and as each assignment."""
    # Many rows have the same before the first layer.
    made: dict[tuple[Format | None, ...], Tensor] = {}

    def embedded(scheme: Scheme) -> Tensor:
        chosen = tuple(scheme.get(path) for path in (EMBEDDING, _FIRST, _SECOND))
        if chosen not in made:
            hidden = _look_up(forms, chosen[0], dialogue.ids)
            hidden[dialogue.image] = _project(forms, chosen[1], chosen[2], features[0])
            made[chosen] = hidden
        return made[chosen]

    source = embedded({})[None]
    hidden = source.new_empty(len(rows), *source.shape[1:])
    for i, scheme in enumerate(rows):
        if _begins(scheme) < 0:
            hidden[i] = embedded(scheme)
    rotation = qwen2.rotary_embedding(config)(source, dialogue.positions[None])
    return _Sample(dialogue, rotation, source, hidden)


def _look_up(forms: _Forms, form: Format | None, ids: Tensor) -> Tensor:
    """[L] → [L, D]. A row of groups is quantized by itself as it is among all the others."""
    rows = qwen2.look_up(forms.source.matrix(f"{EMBEDDING}.weight"), ids)
    return forms.rounded(rows, form)


def _project(
    forms: _Forms, first: Format | None, second: Format | None, features: Tensor
) -> Tensor:
    """[N, C] → [N, D]: Linear, exact GELU, Linear."""
    biases = [forms.source.matrix(f"{path}.bias").float() for path in (_FIRST, _SECOND)]
    hidden = F.gelu(linear(features, forms.matrix(_FIRST, first), biases[0]))
    return linear(hidden, forms.matrix(_SECOND, second), biases[1])


def _ends(
    samples: Sequence[_Sample], rows: Sequence[Scheme], config: TextConfig, forms: _Forms
) -> Tensor:
    """Divergence of every row at every scored place of all samples: float64 [rows, places].

    With Δ the difference of a row's logits from the source's it is log Σ p·exp(Δ) − Σ p·Δ, whose
    two sums go over the vocabulary a block at a time; no row's logits are ever whole.
    """
    norm = forms.source.matrix(NORM[1]).float()
    shape, eps = (config.hidden_size,), config.rms_norm_eps
    places = [sample.dialogue.scored for sample in samples]
    source = torch.cat([s.source[0, p] for s, p in zip(samples, places, strict=True)])
    hidden = torch.cat([s.hidden[:, p] for s, p in zip(samples, places, strict=True)], 1)
    source, hidden = (F.rms_norm(x, shape, norm, eps) for x in (source, hidden))
    path = EMBEDDING if config.tie_word_embeddings else HEAD
    blocks = list(row_blocks(forms.source.matrix(f"{path}.weight").weight.shape))
    expected = [source @ forms.block(path, None, block).T for block in blocks]
    whole = torch.stack([logits.logsumexp(1) for logits in expected]).logsumexp(0)
    sums = hidden.new_zeros(2, *hidden.shape[:2], dtype=torch.float64)
    for form in {scheme.get(path) for scheme in rows}:
        having = [i for i, scheme in enumerate(rows) if scheme.get(path) == form]
        for block, logits in zip(blocks, expected, strict=True):
            weight, share = forms.block(path, form, block).T, (logits - whole[:, None]).exp()
            for some in _chunks(len(having), logits.numel()):
                which = having[some]
                difference = (hidden[which] @ weight - logits).clamp_(max=LARGEST_DIFFERENCE)
                sums[1, which] += (share * difference).sum(2, dtype=torch.float64)
                sums[0, which] += difference.expm1_().mul_(share).sum(2, dtype=torch.float64)
    return (sums[0].log1p() - sums[1]).clamp_(min=0)
