"""Whether the disk has room for a bundle, and for what lies beside it while it is made."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

from fastvlm_mlx.errors import DestinationError
from model_export.bundle_spec import BundleSpec

# What a package adds to its weights: the program's text and the manifest.
PACKAGE_OVERHEAD_BYTES = 1_000_000
# Room for the biases and the few weights that stay fp16 in a compressed encoder.
UNCOMPRESSED_SHARE = 1.05


def check_space(directory: Path, spec: BundleSpec) -> None:
    """Raises DestinationError: `directory` has less room than the bundle needs."""
    needed, free = _needed_bytes(spec), shutil.disk_usage(directory).free
    if free < needed:
        raise DestinationError(
            f"{directory} has {free / 1e6:,.0f} MB free and the bundle needs "
            f"{needed / 1e6:,.0f} MB: make room, or choose another disk"
        )


def _needed_bytes(spec: BundleSpec) -> int:
    """The most that lies on the disk at one time."""
    encoder = _encoder_bytes(spec)
    # coremltools writes the encoder's weights twice, before there is a language model; where there
    # are several sizes, beside a package of each.
    others = len(spec.options.encoder.other_sizes)
    copies = others + 2 if others else 1
    return encoder + max(_llm_bytes(spec), copies * encoder) + PACKAGE_OVERHEAD_BYTES


def _encoder_bytes(spec: BundleSpec) -> int:
    if spec.layout == "mlx":
        return 0  # in the language model's files
    bits = spec.options.encoder.bits_per_weight
    return int(spec.checkpoint.encoder_parameters * bits / 8 * UNCOMPRESSED_SHARE)


def _llm_bytes(spec: BundleSpec) -> int:
    method, size = spec.options.llm.method, spec.llm_bytes
    if method != "rtn":
        size *= 2  # what is calibrated waits beside what is written
    if method == "dwq":
        size += sum(prod(each.shape) for each in spec.checkpoint.llm_specs)  # codes, unpacked
    return size
