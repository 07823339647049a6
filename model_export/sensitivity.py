"""What quantizing each matrix costs, measured: the KL divergence of the next token's distribution.

One matrix at a time is quantized and everything else left as the source has it. All of these
models run together, a layer at a time: a model whose matrix is in layer n is the source up to
there, so it starts as one more row of the batch that layer n hands on. One layer's weights are
resident, and a hidden state for each matrix.

One format is measured so. What the others cost follows from the energy of the error at the
matrix's own output, over the inputs it has on the same data: a divergence is, to second order,
proportional to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from fastvlm_mlx.config import TextConfig
from fastvlm_mlx.quantization import Format
from model_export.checkpoint import Checkpoint
from model_export.pictures import Reference
from model_export.qwen2 import (
    Dialogue,
    Matrix,
    Side,
    SourceWeights,
    decoder_layer,
    layer_state,
    look_up,
    project,
    replace_weight,
    rotary_embedding,
    rounded,
)
from model_export.recipes import EMBEDDING, HEAD, PREFIX, PROJECTOR
from model_export.weights import NORM

# Rows of the batch that go through a layer together.
BATCH = 8

# Nats lost, by the model's path of a matrix and the format it is in.
Losses = Mapping[str, Mapping[Format, float]]


@dataclass
class _Sample:
    """One picture and its questions: the source's hidden state, and one for each matrix so far.

    Attributes:
        hidden: [1 + matrices, L, D]; the first row is the source's.
        paths: of the matrices, in the order of the rows after the first.
    """

    dialogue: Dialogue
    hidden: Tensor
    mask: Tensor
    rotation: tuple[Tensor, Tensor]
    paths: list[str]

    def add(self, path: str, hidden: Tensor) -> None:
        self.hidden = torch.cat([self.hidden, hidden])
        self.paths.append(path)


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    image_token_id: int,
    references: Sequence[Reference],
    formats: Sequence[Format],
    measured: Format,
    progress: Callable[[float], None],
) -> Losses:
    """Nats that each matrix loses in each of `formats`, the mean over the answers' tokens.

    Args:
        references: pictures with questions, and what the source's encoder makes of them.
        measured: the one of `formats` that is measured and not inferred.
        progress: called with the share that is done.
    """
    config = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    weights = SourceWeights(checkpoint)
    errors: dict[str, dict[Format, float]] = {}
    study = _Study(formats, measured, errors)
    samples = [
        _start(checkpoint, weights, tokenizer, image_token_id, reference, study)
        for reference in references
    ]
    layer = decoder_layer(config)
    for index in range(config.num_hidden_layers):
        _advance(layer, f"{PREFIX}model.layers.{index}.", weights, samples, study)
        progress((index + 1) / (config.num_hidden_layers + 1))
    found = _divergences(weights, samples, config, study)
    progress(1.0)
    return {
        path: {form: found[path] * _ratio(by_format, form, measured) for form in formats}
        for path, by_format in errors.items()
    }


def _ratio(errors: Mapping[Format, float], form: Format, measured: Format) -> float:
    return errors[form] / errors[measured] if errors[measured] else 0.0


@dataclass(frozen=True)
class _Study:
    """The formats that are compared, and the error energy found for each, by path."""

    formats: Sequence[Format]
    measured: Format
    errors: dict[str, dict[Format, float]]

    def quantized(self, path: str, weight: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """`weight` [out, in] float32 in the measured format; notes every format's error energy.

        Args:
            inputs: what it is multiplied with, each [tokens, in].
        """
        noted = self.errors.setdefault(path, dict.fromkeys(self.formats, 0.0))
        kept = weight
        for form in self.formats:
            found = rounded(weight, form)
            for x in inputs:
                noted[form] += float(F.linear(x, found - weight).square().sum(dtype=torch.float64))
            if form == self.measured:
                kept = found
        return kept


def _start(
    checkpoint: Checkpoint,
    weights: SourceWeights,
    tokenizer: Tokenizer,
    image_token_id: int,
    reference: Reference,
    study: _Study,
) -> _Sample:
    """One picture and its questions embedded, and with each matrix before the layers rounded."""
    tokens = checkpoint.config.vision.num_tokens
    dialogue = Dialogue.build(tokenizer, reference.picture.questions, image_token_id, tokens)
    features = torch.from_numpy(reference.features)
    embedding = weights.matrix(EMBEDDING + ".weight")
    source = look_up(embedding, dialogue.ids)
    projected = project(Side(weights, features))
    source[dialogue.image] = projected
    rotation = rotary_embedding(checkpoint.config.text)(source[None], dialogue.positions[None])
    sample = _Sample(dialogue, source[None], dialogue.mask, rotation, [])
    for path, image in _projections(weights, features[0], study):
        hidden = source.clone()
        hidden[dialogue.image] = image
        sample.add(path, hidden[None])
    hidden = rounded(look_up(embedding, dialogue.ids), study.measured)
    hidden[dialogue.image] = projected
    sample.add(EMBEDDING, hidden[None])
    return sample


def _projections(
    weights: SourceWeights, features: Tensor, study: _Study
) -> Iterator[tuple[str, Tensor]]:
    """The projector's output [N, D] with the first, then the second of its matrices rounded."""
    first, second = PROJECTOR + "linear_0", PROJECTOR + "linear_2"
    matrix = {
        path: (weights.matrix(f"{path}.weight").float(), weights.matrix(f"{path}.bias").float())
        for path in (first, second)
    }
    middle = F.gelu(F.linear(features, *matrix[first]))
    changed = study.quantized(first, matrix[first][0], [features])
    yield first, F.linear(F.gelu(F.linear(features, changed, matrix[first][1])), *matrix[second])
    changed = study.quantized(second, matrix[second][0], [middle])
    yield second, F.linear(middle, changed, matrix[second][1])


def _advance(
    layer: nn.Module,
    prefix: str,
    weights: SourceWeights,
    samples: Sequence[_Sample],
    study: _Study,
) -> None:
    """Every row through one layer, then a row for each of the layer's matrices."""
    state = layer_state(weights, prefix)
    layer.load_state_dict(state, strict=True, assign=True)
    matrices = [name.removesuffix(".weight") for name in state if state[name].ndim == 2]
    before = [sample.hidden[:1] for sample in samples]
    inputs: dict[str, list[Tensor]] = {name: [] for name in matrices}
    for sample, source in zip(samples, before, strict=True):
        with recorded(layer, inputs):
            first = _run(layer, source, sample)
        rest = [_run(layer, rows, sample) for rows in sample.hidden[1:].split(BATCH)]
        sample.hidden = torch.cat([first, *rest])
    for name in matrices:
        kept = state[f"{name}.weight"]
        changed = study.quantized(prefix + name, kept, inputs.pop(name))
        replace_weight(layer, f"{name}.weight", changed)
        for sample, source in zip(samples, before, strict=True):
            sample.add(prefix + name, _run(layer, source, sample))
        replace_weight(layer, f"{name}.weight", kept)


def _run(layer: nn.Module, hidden: Tensor, sample: _Sample) -> Tensor:
    return layer(hidden, attention_mask=sample.mask, position_embeddings=sample.rotation)


class recorded:  # noqa: N801  a context manager, used as a function
    """Keeps what each matrix of a layer is multiplied with."""

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


def _divergences(
    weights: SourceWeights, samples: Sequence[_Sample], config: TextConfig, study: _Study
) -> dict[str, float]:
    """KL divergence of every row from its sample's source, the mean over all scored places."""
    norm = weights.matrix(NORM[1]).float()
    finals = [
        F.rms_norm(s.hidden[:, s.dialogue.scored], (config.hidden_size,), norm, config.rms_norm_eps)
        for s in samples
    ]
    tied = config.tie_word_embeddings
    path = EMBEDDING if tied else HEAD
    head = weights.matrix(path + ".weight")
    changed = _rounded_rows(path, head, [final[0] for final in finals], study)
    if not tied:
        # Its rows are looked up: their own error is what there is.
        _rounded_rows(EMBEDDING, weights.matrix(EMBEDDING + ".weight"), [None], study)
    total: dict[str, float] = dict.fromkeys(study.errors, 0.0)
    for sample, final in zip(samples, finals, strict=True):
        source = _logits(final[:1], head.blocks()).log_softmax(-1)
        for paths, rows in zip(_batches(sample.paths), final[1:].split(BATCH), strict=True):
            for name, found in zip(paths, _kl(source, _logits(rows, head.blocks())), strict=True):
                # A head that is the embedding is rounded in both places.
                total[name] += found if name != path else 0.0
        row = final[1 + sample.paths.index(path)] if tied else final[0]
        total[path] += _kl(source, _logits(row[None], changed))[0]
    places = sum(final.shape[1] for final in finals)
    return {name: found / places for name, found in total.items()}


def _batches(paths: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(paths), BATCH):
        yield paths[start : start + BATCH]


def _kl(source: Tensor, logits: Tensor) -> list[float]:
    """Of each row [P, V] from the source's log-probabilities [1, P, V], summed over the places."""
    found = source.exp() * (source - logits.log_softmax(-1))
    return [max(0.0, value) for value in found.sum((1, 2), dtype=torch.float64).tolist()]


def _logits(hidden: Tensor, head: Iterable[Tensor]) -> Tensor:
    """[R, P, D] → [R, P, V], the head by blocks of rows."""
    return torch.cat([hidden @ rows.float().T for rows in head], -1)


def _rounded_rows(
    path: str, matrix: Matrix, inputs: Sequence[Tensor | None], study: _Study
) -> list[Tensor]:
    """A large matrix in the measured format, by blocks of rows; notes every format's error energy.

    Args:
        inputs: as in `_Study.quantized`; None stands for the weights' own error.
    """
    noted = study.errors.setdefault(path, dict.fromkeys(study.formats, 0.0))
    kept = []
    for weight in matrix.blocks():
        for form in study.formats:
            found = rounded(weight, form)
            for x in inputs:
                error = found - weight if x is None else F.linear(x, found - weight)
                noted[form] += float(error.square().sum(dtype=torch.float64))
            if form == study.measured:
                kept.append(found.half())
    return kept
