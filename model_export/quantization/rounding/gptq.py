"""GPTQ (Frantar et al., arXiv 2210.17323): each column's rounding error goes into the next ones.

What is minimized is the error of a matrix's output on the calibration data, ‖(W − Q)X‖², column by
column: the columns that are still to be rounded take up what the rounded ones got wrong, by the
inverse of the Hessian H = XXᵀ. Groups have MLX's own grid, of their weights as they are when their
turn comes, as in mlx_lm.quant.gptq.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlm_mlx.bundle.quantization import Format
from model_export.language import qwen2
from model_export.language.affine import Coded, grid
from model_export.quantization.rounding.layers import READS, LayerInputs, StoredArrays, inputs_of

# Added to the Hessian's diagonal, of its mean (the paper's section 3.3).
DAMPING = 0.01
ROWS = 16_384


def quantize(weight: Tensor, hessian: Tensor, form: Format, dtype: torch.dtype) -> Coded:
    """Quantize a weight [R, C] by the Hessian [C, C] of its input; both are float32.

    Codes are found against scales and biases as rounded to `dtype`, so that what is stored is what
    was minimized.
    """
    factor = inverse_factor(hessian)
    # Rows don't depend on each other; an embedding has too many for one piece.
    parts = [
        _quantize_rows(weight[i : i + ROWS].clone(), factor, form, dtype)
        for i in range(0, len(weight), ROWS)
    ]
    codes, scales, biases = (torch.cat(part) for part in zip(*parts, strict=True))
    return Coded(codes, scales, biases, form)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    # An input that is always zero has no say; with nothing seen at all this is plain rounding.
    diagonal.add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _quantize_rows(
    weight: Tensor, factor: Tensor, form: Format, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales, biases = [], []
    for start in range(0, weight.shape[1], form.group_size):
        end = start + form.group_size
        group = weight[:, start:end]
        scale, bias = (part.to(dtype) for part in grid(group, form.bits))
        scales.append(scale)
        biases.append(bias)
        # Contiguous columns: a strided one costs a cache line a row.
        left, errors = _quantize_group(
            group.T.contiguous(),
            factor[start:end, start:end],
            scale.float()[:, 0],
            bias.float()[:, 0],
            form.bits,
        )
        codes[:, start:end] = left.T
        weight[:, end:] -= errors.T @ factor[start:end, end:]
    return codes, torch.cat(scales, 1), torch.cat(biases, 1)


def _quantize_group(
    columns: Tensor, factor: Tensor, scale: Tensor, bias: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes and errors [G, R] of a group's columns [G, R], which are used up."""
    errors = torch.empty_like(columns)
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    # A scale can be too small for its type.
    divisor = torch.where(scale == 0, 1.0, scale)
    for k, column in enumerate(columns):
        code = ((column - bias) / divisor).round_().clamp_(0, 2**bits - 1)
        codes[k] = code
        errors[k] = (column - code.mul_(scale).add_(bias)) / factor[k, k]
        columns[k + 1 :].addr_(factor[k, k + 1 :], errors[k], alpha=-1)
    return codes, errors


def gptq_layer(inputs: LayerInputs) -> StoredArrays:
    """Quantize a layer by GPTQ; the hidden states go on as the quantized layer leaves them."""
    layer, formats, dtype = inputs.layer, inputs.formats, getattr(torch, inputs.dtype)
    moments: dict[str, Tensor] = {}
    for sample in inputs.samples:
        for name, (x,) in inputs_of(layer, [sample]).items():
            moments[name] = moments[name].addmm_(x.T, x) if name in moments else x.T @ x
    finished: StoredArrays = {}
    for name, form in formats.items():
        if form is not None:
            key, hessian = f"{name}.weight", moments[READS[name]]
            coded = quantize(layer.get_parameter(key), hessian, form, dtype)
            finished[key] = coded.arrays()
            qwen2.replace_weight(layer, key, coded.float())
    for sample, hidden in zip(inputs.samples, inputs.outputs(), strict=True):
        sample.hidden = hidden
    return finished
