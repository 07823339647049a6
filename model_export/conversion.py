"""A bundle in the other layout, made from the bundle alone.

An `mlx` bundle holds all that an `app` bundle is made of: FastViTHD's weights one by one, and the
projector and the language model under nearly the same names. The other way there is none: a
package holds the encoder folded, and BatchNorm and layer scale can't be had back out of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.bundle.bundle import ENCODER_PREFIX, Bundle, model_name
from fastvlm_mlx.bundle.config import IMAGE_TOKEN
from fastvlm_mlx.bundle.manifest import hash_tree
from fastvlm_mlx.components import image_processor
from fastvlm_mlx.errors import BundleError
from fastvlm_mlx.extras import needs_extra
from fastvlm_mlx.image.preprocess import ImageProcessor
from model_export.build import build
from model_export.bundle_source import (
    DTYPES,
    EXPORT_AGAIN,
    BundleTensor,
    as_checkpoint,
    bundle_tensors,
)
from model_export.bundle_spec import BundleSpec, WrittenLLM
from model_export.checkpoint import names
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer, export_tokenizer
from model_export.checkpoint.weights.tensors import SafeTensor, row_blocks, safe_tensors
from model_export.destination.destination import check_overlap, check_replaceable, resolve
from model_export.gates import equality
from model_export.gates.gate import Gate
from model_export.gates.verify import recorded_options
from model_export.interruption import ONE_AT_A_TIME, Progress, counted, interruptible
from model_export.language import llm, recipes
from model_export.language.recipes import Scheme
from model_export.options import ENCODER_SNR_DB, DestinationOptions, ExportOptions
from model_export.results import ExportResult

NORM, STEM = names.NORM[0], names.ENCODER_PREFIX + "patch_embed.0.reparam_conv.weight"


@needs_extra()
def convert(
    bundle: str | Path,
    destination: str | Path,
    layout: str = "app",
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> ExportResult:
    """Turn a bundle into one of another layout at `destination`, checked against the bundle.

    Args:
        bundle: a directory of layout `mlx`; one without a manifest, as mlx-vlm converts, too.
        destination: a directory that does not exist, or with `overwrite` one that holds a bundle.
        layout: the new bundle's.
        progress: called with each stage's name and, where it is known, the share that is done.
        overwrite: a bundle that is at the destination already is replaced.

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
        source = Bundle.open(bundle)
        _check_convertible(source, layout)
        check_overlap(place.path, [source.path])
        stage("check files", None)
        source.check_files()
        return build(_spec(source), place, stage)


def _check_convertible(bundle: Bundle, layout: str) -> None:
    """Raises BundleError: the bundle has not what the layout wants, or failed a gate."""
    if bundle.layout == layout:
        raise BundleError(
            f"{bundle.path} is of layout {layout} already: expected a bundle of the other "
            "layout; this one can be used as it is"
        )
    if bundle.layout == "app":
        raise BundleError(
            f"{bundle.path} holds its encoder folded into a Core ML package, and layout mlx "
            f"wants the weights it was folded from: {EXPORT_AGAIN.format('mlx')}"
        )
    # The gates to come compare with this bundle, and would pass whatever it lost itself.
    gates = (bundle.manifest or {}).get("gates", [])
    if failed := [gate["name"] for gate in gates if not gate["passed"]]:
        raise BundleError(
            f"{bundle.path} failed a gate of its own export ({failed[0]}), which a bundle made of "
            f"it would not show: {EXPORT_AGAIN.format('app')}"
        )


def _spec(bundle: Bundle) -> BundleSpec:
    """Decide all that can be decided before anything is written."""
    tensors = bundle_tensors(bundle)
    checkpoint = as_checkpoint(bundle, tensors)
    formats = formats_for_app(bundle)
    tokenizer = export_tokenizer(checkpoint)
    _check_same_reading(bundle, tokenizer)
    copied = [tensors[spec.source] for spec in checkpoint.llm_specs]
    model = _CopiedLanguageModel(bundle, checkpoint, formats, copied)
    gate_options = ExportOptions.of(
        dtype=DTYPES[tensors[NORM].dtype],  # type: ignore[arg-type]
        encoder_precision="fp32" if tensors[STEM].dtype == "F32" else "fp16",
    )
    return BundleSpec(
        checkpoint=checkpoint,
        calibration=None,
        source_bundle=bundle,
        tokenizer=tokenizer,
        formats=formats,
        options=_options(bundle, formats, gate_options),
        gate_options=gate_options,
        llm_bytes=model.bytes,
        write_llm=model.write,
        tensor_gates=lambda written, _: [changed_tensors(copied, written)],
        provenance=lambda: _provenance(bundle, checkpoint),
        advice=EXPORT_AGAIN.format("app"),
    )


@dataclass(frozen=True)
class _CopiedLanguageModel:
    """The language model of a conversion, which is copied byte for byte under new names.

    Attributes:
        copied: its tensors, in the order of `checkpoint.llm_specs`.
    """

    bundle: Bundle
    checkpoint: Checkpoint
    formats: Scheme
    copied: list[BundleTensor]

    @property
    def parts(self) -> list[llm.Part]:
        return [llm.Part(tensor.entries, tensor.blocks) for tensor in self.copied]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def write(self, directory: Path, progress: Progress) -> WrittenLLM:
        advance, specs = counted(progress, self.bytes), self.checkpoint.llm_specs
        summary = llm.write_parts(specs, self.parts, self.formats, directory, advance)
        return WrittenLLM(summary, self._facts())

    def _facts(self) -> dict[str, Any]:
        """What the manifest says of how the tensors were made, as far as it still holds."""
        recorded = (self.bundle.manifest or {}).get("llm", {})
        facts = {key: recorded[key] for key in ("search", "calibration") if key in recorded}
        hashes = recorded.get(equality.TENSORS, {}).items()
        kept = {model_name(n): h for n, h in hashes if not n.startswith(ENCODER_PREFIX)}
        return facts | ({equality.TENSORS: kept} if kept else {})


def formats_for_app(bundle: Bundle) -> Scheme:
    """How the bundle's matrices are stored, and an `app` bundle's can be.

    Raises:
        BundleError: they can't.
    """
    formats = recipes.scheme_of(bundle)
    if reason := recipes.unreadable(formats, "app"):
        raise BundleError(f"{reason}: {EXPORT_AGAIN.format('app')} and one format")
    return formats


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


def _same(tensor: SafeTensor, source: SafeTensor) -> bool:
    return (tensor.dtype, tensor.shape) == (source.dtype, source.shape) and all(
        mx.array_equal(tensor.read(rows).view(mx.uint8), source.read(rows).view(mx.uint8))
        for rows in row_blocks(source.shape)
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
    processor = image_processor(bundle, vision.image_size, aspect_ratio)
    if processor != ImageProcessor(vision.image_size, aspect_ratio):
        raise BundleError(
            f"{bundle.path} normalizes images (mean {processor.image_mean}, deviation "
            f"{processor.image_std}): expected FastVLM's pixels from 0 to 1, correct "
            "preprocessor_config.json"
        )


def _options(bundle: Bundle, formats: Scheme, gate_options: ExportOptions) -> ExportOptions:
    """What the manifest records: the first export's choices and limits, for the other layout."""
    made = _asked_for(formats) if bundle.manifest is None else recorded_options(bundle)
    floor = made.limits.min_snr_db
    if floor is not None:
        # Of the source the package can't keep more than what it is made from does.
        floor = min(floor, ENCODER_SNR_DB[gate_options.encoder.precision])
    return replace(
        made,
        destination=replace(made.destination, layout="app"),
        llm=replace(made.llm, dtype=gate_options.llm.dtype),
        encoder=replace(made.encoder, precision=gate_options.encoder.precision),
        limits=replace(made.limits, min_snr_db=floor),
    )


def _asked_for(formats: Scheme) -> ExportOptions:
    """The options that give this scheme of at most one format."""
    form = next((form for form in formats.values() if form is not None), None)
    if form is None:
        return ExportOptions.of(llm_bits=16)

    def bits(path: str) -> int:
        return form.bits if formats[path] else 16

    return ExportOptions.of(
        llm_bits=form.bits,
        group_size=form.group_size,
        embed_bits=bits(recipes.EMBEDDING),
        head_bits=bits(recipes.HEAD) if recipes.HEAD in formats else None,
        projector_bits=bits(recipes.PROJECTOR + "linear_0"),
    )


def _provenance(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, Any]:
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
