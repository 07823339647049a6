"""AWQ, GPTQ and DWQ of the language model's layers, a layer at a time, on images and questions.

The images go through the source's encoder and projector once. Then each layer is loaded, reads
what comes out of those before it, is quantized, and is put into a file where the writer finds its
tensors. Resident are one layer in float32, what it reads, and the second moments of that. DWQ goes
through all of them many times. Some images are kept back: where nothing is gained on those, plain
rounding is what the bundle gets.

mlx-lm has these, over whole models in MLX; on a CPU MLX takes hours for them. Ours are in torch, on
the layers that the gates run, and held to mlx-lm's by a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from torch import Tensor, nn

from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import OptionError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.names import LAYER
from model_export.checkpoint.tensors import from_torch
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.language import llm, qwen2
from model_export.language.affine import round_weight
from model_export.language.recipes import PREFIX, Scheme
from model_export.options import ExportOptions
from model_export.quantization import awq, dwq, gptq, held_out
from model_export.quantization.sensitivity import recorded
from model_export.samples.calibration import Calibration, record, split
from model_export.samples.images import Reference, each_reference

# AWQ tries sixty roundings of each layer, and looks at whole dialogues of so many tokens for that.
AWQ_TOKENS = 2_048
LAYERS = PREFIX + "model.layers."
MATRICES = tuple(name.removesuffix(".weight") for name, shape in LAYER if len(shape) == 2)

# A layer's tensors as they are written, by their names in it.
Finished = dict[str, list[mx.array]]


@dataclass
class Sample:
    """An image and its questions on their way through the layers.

    Attributes:
        hidden: [1, L, D], what the next layer reads.
        around: the attention's mask and the rotary embedding, by a layer's argument.
        scored: the places whose next token belongs to an answer.
    """

    hidden: Tensor
    around: dict[str, Any]
    scored: Tensor


@dataclass(frozen=True)
class Inputs:
    """One layer, what goes through it and what its matrices become."""

    layer: nn.Module
    samples: Sequence[Sample]
    formats: awq.Formats
    dtype: str

    def outputs(self) -> list[Tensor]:
        return [self.layer(s.hidden, **s.around) for s in self.samples]


def check(chosen: Scheme, method: str) -> None:
    """Whether the method has anything to do, and can.

    Raises:
        OptionError: no matrix of a layer is quantized, or one has a format other than affine.
    """
    formats = {form for path, form in chosen.items() if path.startswith(LAYERS) and form}
    if not formats:
        raise OptionError(
            f"--method {method} is given and no layer is quantized: choose fewer --llm-bits, or "
            "leave it out"
        )
    if other := sorted(str(form) for form in formats if form.mode != "affine"):
        raise OptionError(
            f"--method {method} can't quantize to {other[0]}: it is for affine bits, use "
            "--llm-mode affine, or leave it out"
        )


@dataclass(frozen=True)
class Calibrated:
    """What the method made, if it gains over plain rounding, and what is to be said of it."""

    ready: llm.Ready
    facts: dict[str, Any]
    notes: tuple[str, ...]


@torch.no_grad()
def quantize(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    calibration: Calibration,
    chosen: Scheme,
    options: ExportOptions,
    directory: Path,
    progress: Callable[[str, float | None], None],
) -> Calibrated:
    """Quantize the layers that `chosen` quantizes, into files in `directory`.

    Args:
        options: `llm.method` is "awq", "gptq" or "dwq".

    Raises:
        CheckpointError, OptionError: as `llm.convert`.
    """
    method, name = options.llm.method, options.llm.method.upper()
    seen, judges = split(calibration, checkpoint.config.vision.image_size, held_out.LEAST_IMAGES)
    facts: dict[str, Any] = {
        "sha256": calibration.digest,
        "skipped": list(calibration.skipped),
        "level": held_out.LEVEL,
    }
    if len(judges) < held_out.LEAST_IMAGES:
        facts |= {"method": "rtn", "images": 0}
        return Calibrated({}, facts, (_too_few(name, len(seen) + len(judges)),))
    facts |= {
        "images": len(seen),
        "calibrated_on": record(seen),
        "judged_on": record(judges),
    }
    progress("calibration images", None)
    looked_at = each_reference(checkpoint.encoder_state(), checkpoint, [*seen, *judges])
    # Only features are read from here on.
    references = [replace(each, pixels=each.pixels[:0].copy()) for each in looked_at]
    source = qwen2.SourceWeights(checkpoint)
    samples = samples_of(checkpoint, tokenizer, references[: len(seen)], source)
    work = Work(checkpoint, chosen, options, directory, partial(progress, name))
    if method == "dwq":
        rounded = held_out.Candidate(source, chosen)
        ready = _train(
            work, samples, samples_of(checkpoint, tokenizer, references[: len(seen)], rounded)
        )
    else:
        ready = _layer_by_layer(work, samples)
    progress(f"{name} or rounding", None)
    candidates = [held_out.Candidate(source, chosen, made) for made in ({}, ready)]
    rounding, found = held_out.losses(checkpoint, tokenizer, references[len(seen) :], candidates)
    verdict = held_out.Verdict(rounding, found)
    facts |= {
        "method": method if verdict.gains else "rtn",
        "kl_nats": {"rtn": rounding.to_dict(), method: found.to_dict()},
        "p_value": verdict.p_value,
    }
    note = (
        f"{name} loses {found} on the {len(judges)} images that judge it and plain rounding "
        f"{rounding}; {verdict}"
    )
    if verdict.gains:
        return Calibrated(ready, facts, (note,))
    return Calibrated({}, facts, (f"{note}: the bundle has plain rounding",))


def _too_few(name: str, count: int) -> str:
    found = "one image is" if count == 1 else f"{count} images are"
    return (
        f"{found} too few to calibrate {name} on some and tell on others whether it gains: the "
        f"bundle has plain rounding; give --calibration {2 * held_out.LEAST_IMAGES} different "
        "images or more, or leave it out"
    )


@dataclass(frozen=True)
class Work:
    """What is to be quantized, in which form, and the directory that the results wait in."""

    checkpoint: Checkpoint
    chosen: Scheme
    options: ExportOptions
    directory: Path
    progress: Callable[[float], None]

    @property
    def count(self) -> int:
        return self.checkpoint.config.text.num_hidden_layers

    def layers(self) -> Iterator[tuple[str, awq.State]]:
        """The source's layers, float32: the prefix of each one's names, its tensors.

        Raises:
            CheckpointError, OptionError: as `llm.convert`.
        """
        source = qwen2.SourceWeights(self.checkpoint)
        for index in range(self.count):
            prefix = f"{LAYERS}{index}."
            state = qwen2.layer_state(source, prefix)
            for name, tensor in state.items():
                llm.check_range(
                    (prefix + name).removeprefix(PREFIX), tensor, self.options.llm.dtype
                )
            yield prefix, state

    def formats(self, prefix: str) -> awq.Formats:
        return {name: self.chosen[prefix + name] for name in MATRICES}

    def save(self, prefix: str, finished: Finished) -> llm.Ready:
        file = self.directory / f"{prefix}safetensors"
        mx.save_safetensors(str(file), dict(_named(prefix, finished)))
        return dict.fromkeys((prefix + name for name in finished), file)


def _layer_by_layer(work: Work, samples: Sequence[Sample]) -> llm.Ready:
    """AWQ, GPTQ."""
    layer = qwen2.decoder_layer(work.checkpoint.config.text)
    method = gptq_layer if work.options.llm.method == "gptq" else awq_layer
    ready: dict[str, Path] = {}
    for index, (prefix, state) in enumerate(work.layers()):
        work.progress(index / work.count)
        layer.load_state_dict(state, strict=True, assign=True)
        inputs = Inputs(layer, samples, work.formats(prefix), work.options.llm.dtype)
        ready |= work.save(prefix, method(inputs))
    work.progress(1.0)
    return ready


def _train(work: Work, taught: Sequence[Sample], learning: Sequence[Sample]) -> llm.Ready:
    """DWQ.

    Args:
        taught: what the source's first layer reads; it goes on to the last one.
        learning: what that of the bundle reads.
    """
    work.progress(0.0)
    checkpoint = work.checkpoint
    text = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    source = qwen2.SourceWeights(checkpoint)
    layer = qwen2.decoder_layer(text)
    layers: dict[str, dwq.Layer] = {}
    for prefix, state in work.layers():
        layer.load_state_dict(state, strict=True, assign=True)
        for sample in taught:
            sample.hidden = layer(sample.hidden, **sample.around)
        groups = {
            f"{name}.weight": dwq.Groups(
                state[f"{name}.weight"], form, work.directory / f"{prefix}{name}"
            )
            for name, form in work.formats(prefix).items()
            if form is not None
        }
        rest = [name for name in state if name not in groups]
        layers[prefix] = dwq.Layer(groups, partial(qwen2.layer_state, source, prefix, rest))
    lessons = [
        dwq.Lesson(mine.hidden, mine.around, mine.scored, theirs.hidden[0, theirs.scored])
        for mine, theirs in zip(learning, taught, strict=True)
    ]
    head = dwq.Head(text, source, held_out.Candidate(source, work.chosen))
    dwq.train(layer, list(layers.values()), head, lessons, work.progress)
    dtype = getattr(torch, work.options.llm.dtype)
    ready: dict[str, Path] = {}
    for prefix, each in layers.items():
        finished = {name: part.coded(dtype).arrays() for name, part in each.groups.items()}
        ready |= work.save(prefix, finished)
    return ready


def gptq_layer(inputs: Inputs) -> Finished:
    """GPTQ of a layer; its samples go on as the quantized layer leaves them."""
    layer, formats, dtype = inputs.layer, inputs.formats, getattr(torch, inputs.dtype)
    moments: dict[str, Tensor] = {}
    for sample in inputs.samples:
        seen = seen_by(layer, [sample])
        for name, (x,) in seen.items():
            moments[name] = moments[name].addmm_(x.T, x) if name in moments else x.T @ x
    finished: Finished = {}
    for name, form in formats.items():
        if form is not None:
            key, hessian = f"{name}.weight", moments[awq.READS[name]]
            coded = gptq.quantize(layer.get_parameter(key), hessian, form, dtype)
            finished[key] = coded.arrays()
            qwen2.replace_weight(layer, key, coded.float())
    for sample, hidden in zip(inputs.samples, inputs.outputs(), strict=True):
        sample.hidden = hidden
    return finished


def awq_layer(inputs: Inputs) -> Finished:
    """AWQ of a layer, unless plain rounding loses less; its samples go on as the source has them.

    Nothing is finished of a layer that is better off with plain rounding.
    """
    layer, formats = inputs.layer, inputs.formats
    some = inputs.samples[:: _step(inputs.samples)]
    seen = awq.Seen(seen_by(layer, some), [sample.around for sample in some])
    source = dict(layer.state_dict())
    found = awq.transformed(layer, seen, formats)
    expected = inputs.outputs()

    def loss(state: Mapping[str, Tensor]) -> float:
        rounded = {name: _rounded(name, weight, formats) for name, weight in state.items()}
        layer.load_state_dict(rounded, strict=True, assign=True)
        pairs = zip(inputs.outputs(), expected, strict=True)
        return sum(float((got - wanted).square().sum()) for got, wanted in pairs)

    worthwhile = loss(found) < loss(source)
    for sample, hidden in zip(inputs.samples, expected, strict=True):
        sample.hidden = hidden
    if not worthwhile:
        return {}
    for name, weight in found.items():
        llm.check_range(name, weight, inputs.dtype)
    return {
        name: llm.finish(from_torch(weight), _format(name, formats), inputs.dtype)
        for name, weight in found.items()
    }


def samples_of(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    references: Sequence[Reference],
    weights: qwen2.Weights,
) -> list[Sample]:
    """What the first layer reads of each image and its questions.

    Args:
        weights: the embedding and the projector.
    """
    vision, text = checkpoint.config.vision, checkpoint.config.text
    rotary = qwen2.rotary_embedding(text)
    samples = []
    for reference in references:
        dialogue = qwen2.Dialogue.build(
            tokenizer.tokenizer,
            reference.sample.questions,
            tokenizer.image_token_id,
            vision.num_tokens,
        )
        hidden = qwen2.embed(qwen2.Side(weights, torch.from_numpy(reference.features)), dialogue)
        rotation = rotary(hidden, dialogue.positions[None])
        around = {"attention_mask": dialogue.mask, "position_embeddings": rotation}
        samples.append(Sample(hidden, around, dialogue.scored))
    return samples


def seen_by(layer: nn.Module, samples: Sequence[Sample]) -> dict[str, list[Tensor]]:
    """What the matrices of `awq.READS` read of each sample, [L, C]."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in awq.READS.values()}
    with recorded(layer, inputs):
        for sample in samples:
            layer(sample.hidden, **sample.around)
    return inputs


def _step(samples: Sequence[Sample]) -> int:
    return max(1, sum(sample.hidden.shape[1] for sample in samples) // AWQ_TOKENS)


def _format(name: str, formats: awq.Formats) -> Format | None:
    return formats.get(name.removesuffix(".weight"))


def _rounded(name: str, weight: Tensor, formats: awq.Formats) -> Tensor:
    form = _format(name, formats)
    return weight if form is None else round_weight(weight, form.bits, form.group_size)


def _named(prefix: str, finished: Finished) -> Iterator[tuple[str, mx.array]]:
    """The arrays of each tensor, one or a quantized weight's three, under a bundle's names."""
    for name, arrays in finished.items():
        names = [prefix + name]
        if len(arrays) > 1:
            stem = prefix + name.removesuffix("weight")
            names += [stem + "scales", stem + "biases"]
        yield from zip(names, arrays, strict=True)
