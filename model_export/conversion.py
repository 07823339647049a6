"""A bundle in the other layout, made from the bundle alone.

An `mlx` bundle holds all that an `app` bundle is made of: FastViTHD's weights one by one, and the
projector and the language model under nearly the same names. The other way there is none: a
package holds the encoder folded, and BatchNorm and layer scale can't be had back out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fastvlm_mlx.bundle.bundle import ENCODER_PREFIX, Bundle, model_name
from fastvlm_mlx.bundle.config import IMAGE_TOKEN
from fastvlm_mlx.bundle.manifest import hash_tree
from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import BundleError
from fastvlm_mlx.fastvlm import image_processor
from fastvlm_mlx.image.preprocess import ImageProcessor
from model_export.bundle_spec import Job, Written
from model_export.checkpoint import names
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.sources import Source
from model_export.checkpoint.tensors import ALL, FORMATS, SafeTensor, row_blocks, safe_tensors
from model_export.checkpoint.tokenizer import ExportedTokenizer, export_tokenizer
from model_export.destination.destination import check_replaceable, resolve
from model_export.gates import equality
from model_export.gates.verify import Gate, recorded_options
from model_export.interruption import ONE_AT_A_TIME, Progress, interruptible
from model_export.language import llm, recipes
from model_export.language.recipes import Scheme
from model_export.options import ENCODER_SNR_DB, DestinationOptions, ExportOptions
from model_export.pipeline import ExportResult, build, check_overlap, counted

# safetensors' names of the three types that weights have where they are not quantized.
TYPES = {name: dtype for dtype, (_, name, _) in llm.DTYPES.items()}
FLOATS, ANY = tuple(TYPES), "float16"
NORM, STEM = names.NORM[0], names.ENCODER_PREFIX + "patch_embed.0.reparam_conv.weight"
EXPORT_AGAIN = "export the checkpoint it was made from with `fastvlm export … --layout {}`"


def convert(
    bundle_path: str | Path,
    destination: str | Path,
    layout: str,
    progress: Progress = lambda stage, done: None,
    *,
    overwrite: bool = False,
) -> ExportResult:
    """Turn a bundle into one of another layout at `destination`, checked against the bundle.

    Args:
        bundle_path: a bundle of layout `mlx`; one without a manifest, as mlx-vlm converts, too.

    Raises:
        BundleError: it is not whole, of the wrong layout, or holds what the other one can't.
        OptionError: an unknown layout.
        DestinationError: `destination` exists or can't be written.
        GateError: what was written is not the same model.
    """
    DestinationOptions(layout=layout)  # type: ignore[arg-type]
    with ONE_AT_A_TIME, interruptible(progress) as stage:
        stage("bundle", None)
        place = check_replaceable(resolve(destination), overwrite=overwrite)
        bundle = Bundle.open(bundle_path)
        if bundle.layout == layout:
            raise BundleError(
                f"{bundle.path} is of layout {layout} already: expected a bundle of the other "
                "layout, use it as it is"
            )
        if bundle.layout == "app":
            raise BundleError(
                f"{bundle.path} holds its encoder folded into a Core ML package, and layout mlx "
                f"wants the weights it was folded from: {EXPORT_AGAIN.format('mlx')}"
            )
        check_overlap(place.path, [bundle.path])
        _check_passed(bundle)
        stage("check files", None)
        bundle.check_files()
        return build(_job(bundle), place, stage)


def _job(bundle: Bundle) -> Job:
    tensors = bundle_tensors(bundle)
    checkpoint = as_checkpoint(bundle, tensors)
    chosen = scheme_for_app(bundle)
    tokenizer = export_tokenizer(checkpoint)
    _check_same_reading(bundle, tokenizer)
    specs = checkpoint.llm_specs
    copied = [tensors[spec.source] for spec in specs]
    parts = [llm.Part(tensor.entries, tensor.blocks) for tensor in copied]
    total = sum(part.bytes for part in parts)
    exact = tensors[STEM].dtype == "F32"
    limits = ExportOptions.of(
        dtype=TYPES[tensors[NORM].dtype],  # type: ignore[arg-type]
        encoder_precision="fp32" if exact else "fp16",
    )
    facts = (bundle.manifest or {}).get("llm", {})
    kept = {key: facts[key] for key in ("search", "calibration") if key in facts}
    hashes = facts.get(equality.TENSORS, {}).items()
    if of_llm := {model_name(n): h for n, h in hashes if not n.startswith(ENCODER_PREFIX)}:
        kept[equality.TENSORS] = of_llm
    return Job(
        checkpoint=checkpoint,
        calibration=None,
        source=bundle,
        tokenizer=tokenizer,
        chosen=chosen,
        options=_options(bundle, chosen, limits),
        limits=limits,
        llm_bytes=total,
        write_llm=lambda directory, progress: Written(
            llm.write_parts(specs, parts, chosen, directory, counted(progress, total)), kept
        ),
        own_gates=lambda bundle, written: [changed_tensors(copied, bundle)],
        origin=lambda: _origin(bundle, checkpoint),
        remedy=EXPORT_AGAIN.format("app"),
    )


@dataclass(frozen=True)
class BundleTensor:
    """A tensor of the model as an `mlx` bundle has it; read as a checkpoint holds it: in full, in
    torch's order of axes.

    Attributes:
        stored: by their names there, itself or what its quantized form is made of.
        form: that form.
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
        """What is stored, under an `app` bundle's names."""
        return [
            llm.Stored(model_name(name), tensor.dtype, tensor.shape, _bytes(tensor))
            for name, tensor in self.stored.items()
        ]

    def blocks(self) -> Iterator[mx.array]:
        """All that is stored, some rows at a time."""
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
        expected = llm.packed(spec, form, ANY) if form else llm.stored(spec, {}, ANY)
        stored = {entry.name: _take(bundle, held, entry) for entry in expected}
        tensors[spec.source] = BundleTensor(spec, stored, form)
    if held:
        raise BundleError(
            f"{bundle.path} holds {min(held)}, which is no tensor of the model that config.json "
            "describes: remove the file it came with, or correct config.json"
        )
    return tensors


def _take(bundle: Bundle, held: dict[str, SafeTensor], expected: llm.Stored) -> SafeTensor:
    name, types = expected.name, FLOATS if expected.dtype in FLOATS else (expected.dtype,)
    if name not in held:
        raise BundleError(
            f"{bundle.path} lacks {name}: expected it for the model that config.json describes, "
            + EXPORT_AGAIN.format("app")
        )
    found = held.pop(name)
    if found.dtype not in types or found.shape != expected.shape:
        raise BundleError(
            f"{bundle.path} stores {name} as {found.dtype} {list(found.shape)} where config.json "
            f"implies {' or '.join(types)} {list(expected.shape)}: {EXPORT_AGAIN.format('app')}"
        )
    return found


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


def scheme_for_app(bundle: Bundle) -> Scheme:
    """How the bundle's matrices are stored, and an `app` bundle's can be.

    Raises:
        BundleError: they can't.
    """
    chosen = recipes.scheme_of(bundle)
    if reason := recipes.unreadable(chosen, "app"):
        raise BundleError(f"{reason}: {EXPORT_AGAIN.format('app')} and one format")
    return chosen


def changed_tensors(copied: Iterable[BundleTensor], written: Bundle) -> Gate:
    """How many tensors of the language model are not, byte for byte, what they were made from."""
    held = {n: t for file in written.weight_files for n, t in safe_tensors(file).items()}
    changed = [
        model_name(name)
        for tensor in copied
        for name, source in tensor.stored.items()
        if not _same(held[model_name(name)], source)
    ]
    return Gate("LLM tensors changed", len(changed), "", 0, False, ", ".join(changed[:3]))


def _same(found: SafeTensor, source: SafeTensor) -> bool:
    return (found.dtype, found.shape) == (source.dtype, source.shape) and all(
        mx.array_equal(found.read(rows).view(mx.uint8), source.read(rows).view(mx.uint8))
        for rows in row_blocks(source.shape)
    )


def _bytes(tensor: SafeTensor) -> int:
    return prod(tensor.shape) * FORMATS[tensor.dtype][1].size


def _check_passed(bundle: Bundle) -> None:
    """The gates to come compare with this bundle, and would pass whatever it lost itself."""
    gates = (bundle.manifest or {}).get("gates", [])
    if failed := [gate["name"] for gate in gates if not gate["passed"]]:
        raise BundleError(
            f"{bundle.path} failed a gate of its own export ({failed[0]}), which a bundle made of "
            f"it would not show: {EXPORT_AGAIN.format('app')}"
        )


def _check_same_reading(bundle: Bundle, tokenizer: ExportedTokenizer) -> None:
    """Raises BundleError: an app bundle could not be asked the same about the same pixels."""
    rows = bundle.config.text.vocab_size
    if tokenizer.image_token_id >= rows:
        raise BundleError(
            f"the tokenizer of {bundle.path} leaves none of the embedding's {rows:,} rows for "
            f"{IMAGE_TOKEN}, which an app bundle needs: {EXPORT_AGAIN.format('app')}"
        )
    vision, aspect_ratio = bundle.config.vision, bundle.config.image_aspect_ratio
    found = image_processor(bundle, vision.image_size, aspect_ratio)
    if found != ImageProcessor(vision.image_size, aspect_ratio):
        raise BundleError(
            f"{bundle.path} normalizes images (mean {found.image_mean}, deviation "
            f"{found.image_std}): expected FastVLM's pixels from 0 to 1, correct "
            "preprocessor_config.json"
        )


def _options(bundle: Bundle, chosen: Scheme, limits: ExportOptions) -> ExportOptions:
    """What the manifest records: the first export's choices and limits, for the other layout."""
    made = _asked_for(chosen) if bundle.manifest is None else recorded_options(bundle)
    floor = made.limits.min_snr_db
    if floor is not None:
        # Of the source the package can't keep more than what it is made from does.
        floor = min(floor, ENCODER_SNR_DB[limits.encoder.precision])
    return replace(
        made,
        destination=replace(made.destination, layout="app"),
        llm=replace(made.llm, dtype=limits.llm.dtype),
        encoder=replace(made.encoder, precision=limits.encoder.precision),
        limits=replace(made.limits, min_snr_db=floor),
    )


def _asked_for(chosen: Scheme) -> ExportOptions:
    """The options that give this scheme of at most one format."""
    form = next((form for form in chosen.values() if form is not None), None)
    if form is None:
        return ExportOptions.of(llm_bits=16)

    def bits(path: str) -> int:
        return form.bits if chosen[path] else 16

    return ExportOptions.of(
        llm_bits=form.bits,
        group_size=form.group_size,
        embed_bits=bits(recipes.EMBEDDING),
        head_bits=bits(recipes.HEAD) if recipes.HEAD in chosen else None,
        projector_bits=bits(recipes.PROJECTOR + "linear_0"),
    )


def _origin(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's section of the manifest, the bundle's own where it has none, and the bundle."""
    manifest = bundle.manifest or {}
    return {
        "source": manifest.get("source") or checkpoint.source(),
        "converted_from": {
            "directory": bundle.path.resolve().name,
            "layout": bundle.layout,
            "files": manifest.get("files") or hash_tree(bundle.path),
            "gates": manifest.get("gates"),
        },
    }
