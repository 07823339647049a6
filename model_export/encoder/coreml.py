"""Convert the folded FastViTHD into an `.mlpackage` and check the graph that came of it.

The module goes through torch.export to Core ML. The deployment target is iOS 15 / macOS 12, the
first that knows ML Programs, or iOS 16 / macOS 13, the first that knows compressed weights. The
graph has the same operations for every later target, and all of them allow float32 at both ends of
an fp16 program. torch.jit.trace, which Apple's recipe uses, fails in coremltools 9.0 with numpy 2.4
on the shapes of the attention.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvlm_mlx import __version__
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import DestinationError, GateError, OptionError
from fastvlm_mlx.vision.package import (
    IMAGE,
    INPUT_NAME,
    OUTPUT_NAME,
    PackageInfo,
    describe,
    model_path,
    one_line,
    quiet_coremltools,
)
from model_export.encoder.compression import Compression, compressed
from model_export.encoder.fastvithd import FastViTHD

NOT_COMPRESSED = Compression()

_IDENTIFIERS = uuid.uuid5(uuid.NAMESPACE_URL, "fastvlm-mlx:mlpackage")
_MAX_TRANSPOSES = 2
# coremltools/models/model.py writes this entry, which changes from run to run.
_CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"


@dataclass(frozen=True)
class EncoderMetadata:
    """What the package says about where it comes from.

    Attributes:
        source: the name of the checkpoint.
        license: the licence of its weights, which extends to the package.
        options: entries that are written as they are.
    """

    source: str
    license: str
    author: str = "Apple (FastVLM), converted by fastvlm-mlx"
    version: str = "1.0"
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """How an encoder is written.

    Attributes:
        precision: what the program computes in, fp16 or fp32; input and output are float32 in
            both.
        metadata: what the package says about where it comes from.
        compression: how the weights of an fp16 program are stored.
        target: the first iOS that loads it, iOS15 to iOS18. Compressed weights need iOS16, and
            several functions need iOS18.
        image_input: whether it takes 8-bit RGB images and divides by 255 itself, in float32.
    """

    precision: str
    metadata: EncoderMetadata
    compression: Compression = NOT_COMPRESSED
    target: str = "iOS15"
    image_input: bool = False


def export_encoder(
    module: FastViTHD,
    config: VisionConfig,
    package: Path,
    form: Form,
) -> PackageInfo:
    """Convert the folded encoder and write it to `package`.

    The same module, options and versions make the same bytes.

    Args:
        module: float32 [1, 3, S, S] → [1, N, C], from `model_export.encoder.fastvithd.fold`.
        config: the shapes of the module.
        package: a path ending in `.mlpackage` that does not exist.

    Returns:
        A description of what was written, read back from disk.

    Raises:
        OptionError: an unknown precision.
        DestinationError: `package` exists, has another suffix, or there is no room for it.
        GateError: the graph is not the one that the Neural Engine runs in one piece.
    """
    if form.precision not in ("fp16", "fp32"):
        raise OptionError(f"encoder precision {form.precision!r} is unknown: choose fp16 or fp32")
    with appearing_package(package):
        _convert(module, config, package, form)
        info = describe(package)
        check_graph(info, config, form)
    return info


@contextmanager
def appearing_package(package: Path) -> Iterator[None]:
    """Write a new package within; if that fails or is interrupted, nothing half-written stays.

    Raises:
        DestinationError: `package` exists, has another suffix, or there is no room for it.
    """
    if package.suffix != ".mlpackage":
        raise DestinationError(f"{package} can't hold the encoder: expected a name in .mlpackage")
    if package.exists():
        raise DestinationError(
            f"{package} exists: expected a new path, remove it or choose another"
        )
    whole = False
    try:
        yield
        whole = True
    # What writes weights and package in C++ raises nothing more specific.
    except RuntimeError as error:
        if "filesystem error" not in str(error) and "FileWriter" not in str(error):
            raise
        raise DestinationError(
            f"the encoder can't be written ({one_line(error)}): expected room for it twice in "
            f"{package.parent}, make some"
        ) from error
    finally:
        if not whole:
            shutil.rmtree(package, ignore_errors=True)


def check_graph(info: PackageInfo, config: VisionConfig, form: Form) -> None:
    """Check the operations of the exported graph, and the types and shapes of its ends.

    Raises:
        GateError: a channel norm was not fused, a transpose or a cast was inserted, or an input or
            output is not of the expected type and shape.
    """
    norms = sum(
        count
        for count, mixer in zip(config.layers, config.token_mixers, strict=True)
        if mixer == "attention"
    )
    casts = 2 if form.precision == "fp16" else 0
    counts = {name: info.ops.get(name, 0) for name in ("layer_norm", "transpose", "cast")}
    if (
        counts["layer_norm"] != norms
        or counts["transpose"] > _MAX_TRANSPOSES
        or counts["cast"] != casts
    ):
        raise GateError(
            f"the exported encoder has {counts['layer_norm']} layer_norm, {counts['transpose']} "
            f"transpose and {counts['cast']} cast: expected {norms}, at most {_MAX_TRANSPOSES} and "
            f"{casts}, use the tested versions of torch and coremltools"
        )
    ends = [(f.name, f.dtype, f.shape) for f in (*info.inputs, *info.outputs)]
    size = config.image_size
    expected = [
        (INPUT_NAME, IMAGE if form.image_input else "float32", (1, 3, size, size)),
        (OUTPUT_NAME, "float32", (1, config.num_tokens, config.hidden_size)),
    ]
    if ends != expected:
        raise GateError(
            f"the exported encoder declares {ends}: expected {expected}, use the tested versions "
            "of torch and coremltools"
        )
    half = form.precision == "fp16"
    expected_weights = form.compression.precision if half else form.precision
    if info.precision != expected_weights:
        raise GateError(
            f"the exported encoder holds {info.precision} weights: expected {expected_weights}, "
            "use the tested versions of torch and coremltools"
        )


def _convert(
    module: FastViTHD,
    config: VisionConfig,
    package: Path,
    form: Form,
) -> None:
    with quiet_coremltools(), temporary_files_in(package.parent):
        import coremltools as ct
        from coremltools.converters.mil import Builder

        # A conversion that was interrupted leaves its count of names, and the next one would begin
        # there: the same encoder in other bytes.
        Builder.name_count.clear()
        shape = (1, 3, config.image_size, config.image_size)
        with torch.no_grad():
            program = torch.export.export(module, (torch.zeros(shape),)).run_decompositions({})
        model = ct.convert(
            program,
            convert_to="mlprogram",
            inputs=[
                ct.ImageType(INPUT_NAME, shape, scale=1 / 255, color_layout=ct.colorlayout.RGB)
                if form.image_input
                # Without a dtype, an fp16 program's ends become float16 from iOS 16 on.
                else ct.TensorType(INPUT_NAME, shape, dtype=np.float32)
            ],
            outputs=[ct.TensorType(OUTPUT_NAME, dtype=np.float32)],
            minimum_deployment_target=getattr(ct.target, form.target),
            compute_precision=(
                ct.precision.FLOAT16 if form.precision == "fp16" else ct.precision.FLOAT32
            ),
            skip_model_load=True,
            package_dir=None if form.compression.formats else str(package),
        )
        if form.compression.formats:
            model = compressed(model, form.compression)
            model.save(str(package))
        spec = model.get_spec()
    _write_metadata(spec, config, form)
    normalize(spec, package)


@contextmanager
def temporary_files_in(directory: Path) -> Iterator[None]:
    """Keep the temporary files of every thread of this process below `directory`, and remove them.

    coremltools writes the weights to a temporary file first, which a process that is killed leaves
    behind. Where the bundle is being made, the next export finds and removes it.
    """
    earlier = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".temporary-", dir=directory) as scratch:
        tempfile.tempdir = scratch
        try:
            yield
        finally:
            tempfile.tempdir = earlier


def _write_metadata(spec: Any, config: VisionConfig, form: Form) -> None:
    metadata, compression = form.metadata, form.compression
    size, tokens, channels = config.image_size, config.num_tokens, config.hidden_size
    description = spec.description
    description.input[0].shortDescription = (
        f"RGB image, {size}×{size}, 8 bits a channel"
        if form.image_input
        else f"RGB image, [1, 3, {size}, {size}], channel, row, column; values from 0 to 1, no "
        "mean subtracted"
    ) + "; the checkpoint's own padding or crop comes before"
    description.output[0].shortDescription = (
        f"{tokens} tokens of {channels} channels, [1, {tokens}, {channels}], row-major over the "
        f"{config.grid}×{config.grid} feature map; the input of the projector"
    )
    about = description.metadata
    about.shortDescription = (
        f"FastViTHD, the vision encoder of FastVLM, at {size}×{size}: "
        f"computes in {form.precision}, "
        + (f"weights stored as {compression.precision}, " if compression.formats else "")
        + ("images in, float32 out" if form.image_input else "float32 in and out")
    )
    about.author = metadata.author
    about.license = metadata.license
    about.versionString = metadata.version
    about.userDefined.pop(_CONVERSION_DATE, None)
    entries = {
        **metadata.options,
        **compression.metadata(),
        "source": metadata.source,
        "precision": form.precision,
        "image_size": str(size),
        "tokens": str(tokens),
        "vision_config": json.dumps(config.to_dict(), sort_keys=True),
        "fastvlm_mlx": __version__,
        "coremltools": version("coremltools"),
        "torch": version("torch"),
        "python": platform.python_version(),
    }
    for key, value in entries.items():
        about.userDefined[key] = value


def normalize(spec: Any, package: Path) -> None:
    """Write the specification and Manifest.json without dates, random identifiers and map order."""
    model_path(package).write_bytes(spec.SerializeToString(deterministic=True))
    manifest = package / "Manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    identifiers = {
        old: str(uuid.uuid5(_IDENTIFIERS, item["path"])).upper()
        for old, item in content["itemInfoEntries"].items()
    }
    content["itemInfoEntries"] = {
        identifiers[old]: item for old, item in content["itemInfoEntries"].items()
    }
    content["rootModelIdentifier"] = identifiers[content["rootModelIdentifier"]]
    manifest.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")
