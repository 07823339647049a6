"""DWQ: scales and biases are trained towards the source's distribution of the next token.

The codes of plain rounding stay. As in mlx_lm.quant.dwq what is minimized is the KL divergence from
the source, by Adam; there the whole model is resident, here one layer: the way forward keeps what
each layer reads, and the way back computes each once more for its gradients. Scales and biases and
Adam's two moments of them stay in memory, in groups of 64 weights 0.4 bytes for each; the codes lie
in files that are mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from fastvlm_mlx.bundle.config import TextConfig
from fastvlm_mlx.bundle.quantization import Format
from model_export.checkpoint.names import EMBEDDING, HEAD, NORM
from model_export.language import llm, qwen2
from model_export.language.affine import Coded, encode, grid
from model_export.language.weights import Matrix, SourceWeights, Weights
from model_export.quantization.rounding import held_out
from model_export.quantization.rounding.layers import HiddenStates, Work

# Of a matrix's mean scale, what a step changes at first; it falls to zero at the end.
RATE = 0.001
STEPS = 64


class Groups(nn.Module):
    """A matrix whose scales and biases are trained: float32 [R, C / group_size]."""

    def __init__(self, weight: Tensor, form: Format, file: Path):
        """The grid of plain rounding for `weight` [R, C]; its codes go into `file`."""
        super().__init__()
        groups = weight.unflatten(1, (-1, form.group_size))
        scales, biases = grid(groups, form.bits)
        mapped = torch.from_file(str(file), shared=True, size=weight.numel(), dtype=torch.uint8)
        self.codes = mapped.view(weight.shape)
        self.codes.copy_(encode(groups, scales, biases, form.bits).view(weight.shape))
        self.scales, self.biases = nn.Parameter(scales[..., 0]), nn.Parameter(biases[..., 0])
        self.form = form

    def forward(self) -> Tensor:
        """The weight [R, C]."""
        grouped = self.codes.float().view(*self.scales.shape, -1)
        return (grouped * self.scales[..., None] + self.biases[..., None]).view(self.codes.shape)

    def coded(self, dtype: torch.dtype) -> Coded:
        scales, biases = (part.detach().to(dtype) for part in (self.scales, self.biases))
        return Coded(self.codes, scales, biases, self.form)


@dataclass(frozen=True)
class Layer:
    """One layer of the model that is trained.

    Attributes:
        groups: the matrices that are, by their parameters' names.
        rest: reads the other parameters.
    """

    groups: Mapping[str, Groups]
    rest: Callable[[], dict[str, Tensor]]

    def state(self) -> dict[str, Tensor]:
        return self.rest() | {name: part() for name, part in self.groups.items()}


@dataclass(frozen=True)
class TrainingDialogue:
    """One image's dialogue, as DWQ trains on it.

    Attributes:
        hidden: [1, L, D], what the first layer reads.
        around: a layer's other arguments.
        scored: the places whose next token is compared.
        target: [P, D], what the source's last layer makes of them.
    """

    hidden: Tensor
    around: Mapping[str, Any]
    scored: Tensor
    target: Tensor


@dataclass(frozen=True)
class Head:
    """From the last layer to logits: the source's, and as the bundle will have it."""

    config: TextConfig
    source: Weights
    rounded: Weights

    def gradient(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Compute the gradient [P, D] of the KL divergence from the target, the mean of places."""
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = self._normed(hidden)
        name = (EMBEDDING if self.config.tie_word_embeddings else HEAD)[1]
        matrix = self.rounded.matrix(name)
        p = _logits(self._normed(target), self.source.matrix(name)).softmax(1)
        q = _logits(normed.detach(), matrix).softmax(1)
        wrong = q.sub_(p).div_(len(hidden))
        gradient, start = torch.zeros_like(hidden), 0
        for rows in matrix.blocks():
            gradient += wrong[:, start : start + len(rows)] @ rows
            start += len(rows)
        (found,) = torch.autograd.grad(normed, hidden, gradient)
        return found

    def _normed(self, hidden: Tensor) -> Tensor:
        norm = self.source.matrix(NORM[1]).float()
        return F.rms_norm(hidden, (hidden.shape[1],), norm, self.config.rms_norm_eps)


def _logits(normed: Tensor, matrix: Matrix) -> Tensor:
    return torch.cat([normed @ rows.T for rows in matrix.blocks()], 1)


@torch.no_grad()
def train(
    layer: nn.Module,
    layers: Sequence[Layer],
    head: Head,
    dialogues: Sequence[TrainingDialogue],
    progress: Callable[[float], None],
) -> None:
    """Train the groups of all layers.

    Args:
        layer: a decoder layer, whose parameters are given with each call.
    """
    groups = [part for each in layers for part in each.groups.values()]
    optimizer = torch.optim.Adam(
        {"params": part.parameters(), "lr": RATE * float(part.scales.detach().abs().mean())}
        for part in groups
    )
    schedule = LinearLR(optimizer, 1, 0, STEPS)
    for step in range(STEPS):
        for _ in backward(layer, layers, head, dialogues[step % len(dialogues)]):
            # Of this layer: no other has gradients now.
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        progress((step + 1) / STEPS)


def backward(
    layer: nn.Module, layers: Sequence[Layer], head: Head, dialogue: TrainingDialogue
) -> Iterator[int]:
    """Yield the indices of the layers, last first, when their parameters have gradients."""
    read = [dialogue.hidden]
    for each in layers:
        read.append(_call(layer, each, read[-1], dialogue))
    last = read.pop()
    gradient = torch.zeros_like(last)
    gradient[0, dialogue.scored] = head.gradient(last[0, dialogue.scored], dialogue.target)
    for index in reversed(range(len(layers))):
        hidden = read.pop().detach().requires_grad_()
        with torch.enable_grad():
            _call(layer, layers[index], hidden, dialogue).backward(gradient)
        yield index
        if hidden.grad is not None:
            gradient = hidden.grad


def _call(layer: nn.Module, each: Layer, hidden: Tensor, dialogue: TrainingDialogue) -> Tensor:
    return torch.func.functional_call(layer, each.state(), (hidden,), dict(dialogue.around))


def train_layers(
    work: Work, source_states: Sequence[HiddenStates], rounded_states: Sequence[HiddenStates]
) -> llm.Ready:
    """Train the scales and biases of all layers, and save the layers.

    Args:
        source_states: what the source's first layer reads; they go on to the last layer.
        rounded_states: what the bundle's first layer reads.
    """
    work.progress(0.0)
    checkpoint = work.checkpoint
    text = replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied)
    source = SourceWeights(checkpoint)
    layer = qwen2.decoder_layer(text)
    layers: dict[str, Layer] = {}
    for prefix, state in work.layers():
        layer.load_state_dict(state, strict=True, assign=True)
        for sample in source_states:
            sample.hidden = layer(sample.hidden, **sample.around)
        groups = {
            f"{name}.weight": Groups(
                state[f"{name}.weight"], form, work.directory / f"{prefix}{name}"
            )
            for name, form in work.formats(prefix).items()
            if form is not None
        }
        rest = [name for name in state if name not in groups]
        layers[prefix] = Layer(groups, partial(qwen2.layer_state, source, prefix, rest))
    dialogues = [
        TrainingDialogue(mine.hidden, mine.around, mine.scored, theirs.hidden[0, theirs.scored])
        for mine, theirs in zip(rounded_states, source_states, strict=True)
    ]
    head = Head(text, source, held_out.PlannedWeights(source, work.scheme))
    train(layer, list(layers.values()), head, dialogues, work.progress)
    dtype = getattr(torch, work.options.llm.dtype)
    ready: dict[str, Path] = {}
    for prefix, each in layers.items():
        finished = {name: part.coded(dtype).arrays() for name, part in each.groups.items()}
        ready |= work.save(prefix, finished)
    return ready
