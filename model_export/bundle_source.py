"""An `mlx` bundle as the checkpoint that it could have been made from, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from fastvlm_mlx.bundle.bundle import ENCODER_PREFIX, Bundle, model_name
from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import BundleError
from model_export.checkpoint import names
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.sources import Source
from model_export.checkpoint.weights.tensors import (
    ALL,
    FORMATS,
    SafeTensor,
    row_blocks,
    safe_tensors,
)
from model_export.language import llm, recipes

# safetensors' names of the three types that weights have where they are not quantized.
DTYPES = {name: dtype for dtype, (_, name, _) in llm.DTYPES.items()}
FLOATS, ANY_FLOAT = tuple(DTYPES), "float16"
EXPORT_AGAIN = "export the checkpoint it was made from with `fastvlm export … --layout {}`"


@dataclass(frozen=True)
class BundleTensor:
    """A tensor of the model as an `mlx` bundle stores it. It is read as a checkpoint holds it: not
    quantized, and with torch's order of axes.

    Attributes:
        stored: the tensor itself, or the parts of its quantized form, by their names in the bundle.
        form: the quantized form, if it has one.
    """

    spec: names.TensorSpec
    stored: Mapping[str, SafeTensor]
    form: Format | None

    @property
    def dtype(self) -> str:
        return "F32" if self.form else self.stored[self.spec.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape, axes = self.spec.shape, self._axes
        return shape if axes is None else tuple(shape[axis] for axis in axes)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file for tensor in self.stored.values() for file in tensor.files)

    @property
    def _axes(self) -> tuple[int, ...] | None:
        axes = self.spec.axes
        return None if axes is None else tuple(int(axis) for axis in np.argsort(axes))

    def read(self, rows: slice = ALL) -> mx.array:
        if self.form is not None:
            words, scales, *biases = (tensor.read(rows) for tensor in self.stored.values())
            bias = biases[0] if biases else None
            return mx.dequantize(words, scales, bias, **asdict(self.form)).astype(mx.float32)
        tensor, axes = self.stored[self.spec.name], self._axes
        if axes is None:
            return tensor.read(rows)
        return mx.contiguous(tensor.read().transpose(axes))[rows]

    @property
    def entries(self) -> list[llm.Stored]:
        """The stored parts under an `app` bundle's names."""
        return [
            llm.Stored(model_name(name), tensor.dtype, tensor.shape, _bytes(tensor))
            for name, tensor in self.stored.items()
        ]

    def blocks(self) -> Iterator[mx.array]:
        """The stored parts, some rows at a time."""
        for tensor in self.stored.values():
            yield from map(tensor.read, row_blocks(tensor.shape))


def bundle_tensors(bundle: Bundle) -> dict[str, BundleTensor]:
    """The tensors of an `mlx` bundle by a checkpoint's names, quantized as they are.

    Raises:
        BundleError: one is missing, or is none of the model's, or is not of the type, the shape
            or the quantized form that config.json implies.
    """
    held = {n: t for file in bundle.weight_files for n, t in safe_tensors(file).items()}
    tied = names.HEAD[1] not in held
    tensors = {}
    for spec in names.bundle_specs(bundle.config, tied=tied, layout="mlx"):
        if spec.name not in held and names.is_unused(spec.name.removeprefix(ENCODER_PREFIX)):
            continue
        scales = spec.name.removesuffix("weight") + "scales"
        matrix = len(spec.shape) == 2 and scales in held
        form = bundle.format_of(recipes.path_of(spec)) if matrix else None
        expected = llm.packed(spec, form, ANY_FLOAT) if form else llm.stored(spec, {}, ANY_FLOAT)
        stored = {entry.name: _take(bundle, held, entry) for entry in expected}
        tensors[spec.source] = BundleTensor(spec, stored, form)
    if held:
        raise BundleError(
            f"{bundle.path} holds {min(held)}, which is no tensor of the model that config.json "
            "describes: remove the file it came with, or correct config.json"
        )
    return tensors


def _take(bundle: Bundle, held: dict[str, SafeTensor], expected: llm.Stored) -> SafeTensor:
    """Take a tensor out of `held`, once it is found to be as config.json implies."""
    name, types = expected.name, FLOATS if expected.dtype in FLOATS else (expected.dtype,)
    if name not in held:
        raise BundleError(
            f"{bundle.path} lacks {name}: expected it for the model that config.json describes, "
            + EXPORT_AGAIN.format("app")
        )
    tensor = held.pop(name)
    if tensor.dtype not in types or tensor.shape != expected.shape:
        raise BundleError(
            f"{bundle.path} stores {name} as {tensor.dtype} {list(tensor.shape)} where config.json "
            f"implies {' or '.join(types)} {list(expected.shape)}: {EXPORT_AGAIN.format('app')}"
        )
    return tensor


def as_checkpoint(bundle: Bundle, tensors: Mapping[str, BundleTensor]) -> Checkpoint:
    """An `mlx` bundle as the checkpoint that it could have been made from.

    Args:
        tensors: from `bundle_tensors`.
    """
    raw, vision = dict(bundle.raw_config), bundle.config.vision
    for key in ("quantization", "quantization_config", "vision_config"):
        raw.pop(key, None)
    if vision.is_mobileclip_l:
        raw["mm_vision_tower"] = f"mobileclip_l_{vision.image_size}"
    else:
        raw["vision_config"] = vision.to_dict()
    if bundle.manifest is not None:
        source = bundle.manifest["source"]
        raw |= {"_name_or_path": source["name"], "license": source["license"]}
    tied = names.HEAD[0] not in tensors
    return Checkpoint.of(Source("mlx bundle", (bundle.path,), raw, dict(tensors), tied=tied))


def _bytes(tensor: SafeTensor) -> int:
    return prod(tensor.shape) * FORMATS[tensor.dtype][1].size
