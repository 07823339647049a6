"""Multifunction packages: several input sizes in one encoder, with one set of weights.

The Neural Engine wants programs of static shapes, so each size is converted to a function of its
own. Only shapes depend on the size: the weights of all functions are the same bytes, and the
package stores them once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.vision.package import PackageInfo, describe, quiet_coremltools, read_spec
from model_export.encoder.coreml import (
    Form,
    appearing_package,
    check_graph,
    export_encoder,
    normalize,
    temporary_files_in,
)
from model_export.encoder.fastvithd import FastViTHD, resized


def export_sizes(
    module: FastViTHD,
    configs: Sequence[VisionConfig],
    package: Path,
    form: Form,
    progress: Callable[[float], None] = lambda done: None,
) -> PackageInfo:
    """Write an encoder that takes images of one or several sizes.

    Args:
        module: an encoder of any input size.
        configs: one for each size; the first is that of the default function.

    The other arguments, the result and the errors are those of `coreml.export_encoder`.
    """

    def convert(config: VisionConfig, path: Path) -> PackageInfo:
        return export_encoder(resized(module, config), config, path, form)

    if len(configs) == 1:
        return convert(configs[0], package)
    with (
        appearing_package(package),
        tempfile.TemporaryDirectory(dir=package.parent, prefix=".functions-") as scratch,
    ):
        parts: list[Path] = []
        for config in configs:
            progress(len(parts) / len(configs))
            parts.append(Path(scratch) / f"{config.image_size}.mlpackage")
            convert(config, parts[-1])
        _join(parts, [config.image_size for config in configs], package)
        for config in configs:
            info = describe(package, config.image_size)
            check_graph(info, config, form)
    return describe(package)


def _join(parts: Sequence[Path], sizes: Sequence[int], package: Path) -> None:
    """Write `parts` as functions of one package, the first of them its default."""
    names = [f"size_{size}" for size in sizes]
    with quiet_coremltools(), temporary_files_in(package.parent):
        from coremltools import utils

        joined = utils.MultiFunctionDescriptor()
        for name, part in zip(names, parts, strict=True):
            joined.add_function(str(part), "main", name)
        joined.default_function_name = names[0]
        utils.save_multifunction(joined, str(package))
    spec = read_spec(package)
    about = spec.description.metadata
    about.CopyFrom(read_spec(parts[0]).description.metadata)
    also = ", ".join(f"{size}×{size}" for size in sizes[1:])
    about.shortDescription += f"; other functions with the same weights: {also}"
    about.userDefined["image_sizes"] = ",".join(map(str, sizes))
    normalize(spec, package)
