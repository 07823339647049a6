"""AWQ (Lin et al., arXiv 2306.00978): channels that see large inputs are scaled up before rounding.

A matrix's input channels are multiplied by factors that the norm or the matrix before it divides
by, so that the layer computes the same and rounding loses less where it matters. The factors are
each channel's mean magnitude to a power that is searched for; then each group's range is clipped
where that lowers the error of its output. Searches, grids and losses are mlx_lm.quant.awq's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvlm_mlx.bundle.quantization import Format
from model_export.checkpoint.weights.tensors import from_torch
from model_export.language import llm
from model_export.language.affine import round_weight
from model_export.quantization.rounding.layers import (
    READS,
    Formats,
    HiddenStates,
    LayerInputs,
    State,
    StoredArrays,
    inputs_of,
)

# AWQ tries sixty roundings of each layer, and looks at whole dialogues of so many tokens for that.
AWQ_TOKENS = 2_048
POWERS = tuple(i / 20 for i in range(20))
# Of a group's largest magnitude.
CLIPS = tuple(1 - i / 20 for i in range(10))
# Rows of a matrix that are clipped at a time.
ROWS = 2_048
UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class Scaling:
    """Matrices that read one input, the module that makes it, and the block whose output counts."""

    before: str
    matrices: tuple[str, ...]
    block: str


SCALINGS = (
    Scaling(
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn",
    ),
    Scaling("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    Scaling("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
)


@dataclass(frozen=True)
class CalibrationInputs:
    """The inputs [L, C] of the matrices of `READS`, for each dialogue of the calibration set.

    Attributes:
        around: the attention's other arguments, for each dialogue.
    """

    inputs: Mapping[str, Sequence[Tensor]]
    around: Sequence[Mapping[str, Any]]


def transformed(layer: nn.Module, recorded: CalibrationInputs, formats: Formats) -> State:
    """Scale and clip a layer's weights so that rounding them loses less.

    Args:
        layer: keeps its own weights.
    """
    scales = search_scales(layer, recorded, formats)
    state = scaled(layer.state_dict(), scales)
    for name, form in formats.items():
        if form is not None and name not in UNCLIPPED:
            inputs = torch.cat(list(recorded.inputs[READS[name]])) / scales.get(READS[name], 1.0)
            state[name + ".weight"] = clipped(state[name + ".weight"], inputs, form)
    return state


def search_scales(
    layer: nn.Module, recorded: CalibrationInputs, formats: Formats
) -> dict[str, Tensor]:
    """Search the factors of each input's channels, where a matrix that reads it is rounded."""
    return {
        s.matrices[0]: _search_scale(layer, s, recorded, formats)
        for s in SCALINGS
        if any(formats[name] for name in s.matrices)
    }


def scaled(state: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> State:
    """Scale the channels of a layer, which computes the same afterwards."""
    result = dict(state)
    for scaling in SCALINGS:
        factors = scales.get(scaling.matrices[0])
        if factors is None:
            continue
        before = result[scaling.before + ".weight"]
        divisor = factors if before.ndim == 1 else factors[:, None]
        result[scaling.before + ".weight"] = before / divisor
        for name in scaling.matrices:
            result[name + ".weight"] = result[name + ".weight"] * factors
    return result


def _search_scale(
    layer: nn.Module, scaling: Scaling, recorded: CalibrationInputs, formats: Formats
) -> Tensor:
    inputs = recorded.inputs[scaling.matrices[0]]
    block = layer.get_submodule(scaling.block)
    rounded = {name: form for name in scaling.matrices if (form := formats[name]) is not None}
    modules = {name: layer.get_submodule(name) for name in rounded}
    weights = {name: layer.get_parameter(f"{name}.weight") for name in rounded}

    def outputs() -> Tensor:
        if scaling.block != "self_attn":
            return block(together)
        found = [
            block(hidden_states=x[None], **around)[0][0]
            for x, around in zip(inputs, recorded.around, strict=True)
        ]
        return torch.cat(found)

    together = torch.cat(list(inputs))
    expected = outputs()
    magnitude = together.abs().mean(0)
    best, least = torch.ones_like(magnitude), float("inf")
    for power in POWERS:
        factors = magnitude.pow(power).clamp_min(1e-4)
        factors /= (factors.max() * factors.min()).sqrt()
        for name, form in rounded.items():
            weight = round_weight(weights[name] * factors, form.bits, form.group_size)
            modules[name].weight = nn.Parameter(weight.div_(factors), requires_grad=False)
        loss = float((outputs() - expected).square().mean())
        if loss < least:
            best, least = factors, loss
    for name, module in modules.items():
        module.weight = weights[name]
    return best


def clipped(weight: Tensor, inputs: Tensor, form: Format) -> Tensor:
    """Clip each group's range of a weight [R, C] where its output on `inputs` [T, C] gains.

    A group's share of the output has the error ‖ΔX‖², which is Δ(XXᵀ)Δᵀ: no output is computed.
    """
    grouped = inputs.unflatten(1, (-1, form.group_size)).transpose(0, 1)
    hessian = grouped.mT @ grouped
    return torch.cat([_clip_rows(rows, hessian, form) for rows in weight.split(ROWS)])


def _clip_rows(weight: Tensor, hessian: Tensor, form: Format) -> Tensor:
    """`hessian`: for each group [G, g, g]."""
    groups = weight.unflatten(1, (-1, form.group_size))
    largest = groups.abs().amax(-1, keepdim=True)
    best, least = largest, torch.full(largest.shape[:2], float("inf"))
    for share in CLIPS:
        limit = largest * share
        cut = groups.clamp(-limit, limit).flatten(1)
        lost = round_weight(cut, form.bits, form.group_size).sub_(weight).view(groups.shape)
        lost = lost.transpose(0, 1)
        error = (lost @ hessian).mul_(lost).sum(-1).T
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[..., None], limit, best)
    return groups.clamp(-best, best).flatten(1)


def awq_layer(inputs: LayerInputs) -> StoredArrays:
    """Quantize a layer by AWQ, unless plain rounding loses less; then nothing is returned.

    The hidden states go on as the source's layer leaves them.
    """
    layer, formats = inputs.layer, inputs.formats
    some = inputs.samples[:: _step(inputs.samples)]
    recorded = CalibrationInputs(inputs_of(layer, some), [sample.around for sample in some])
    source = dict(layer.state_dict())
    found = transformed(layer, recorded, formats)
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


def _step(samples: Sequence[HiddenStates]) -> int:
    return max(1, sum(sample.hidden.shape[1] for sample in samples) // AWQ_TOKENS)


def _format(name: str, formats: Formats) -> Format | None:
    return formats.get(name.removesuffix(".weight"))


def _rounded(name: str, weight: Tensor, formats: Formats) -> Tensor:
    form = _format(name, formats)
    return weight if form is None else round_weight(weight, form.bits, form.group_size)
