"""What differs between the layouts, behind one name for both."""

from __future__ import annotations

from pathlib import Path

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.vision.package import PackageInfo
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import ExportedTokenizer
from model_export.language.recipes import Scheme
from model_export.layouts import app, mlx


def write_configs(
    checkpoint: Checkpoint,
    tokenizer: ExportedTokenizer,
    formats: Scheme,
    layout: str,
    dtype: str,
    directory: Path,
) -> None:
    """Write the JSON files beside the weights.

    Args:
        formats: each matrix's format.
        dtype: the type of what is not quantized.
    """
    config = app.app_config(checkpoint, formats, layout, dtype, tokenizer.image_token_id)
    if layout == "app":
        app.write_app_configs(checkpoint, tokenizer, config, directory)
    else:
        mlx.write_mlx_configs(checkpoint, tokenizer, config, directory)


def check_layout(bundle: Bundle, package: PackageInfo | None) -> None:
    """Decode a bundle by the rules of the programs that load it.

    Args:
        package: what the encoder's package says of itself; an `mlx` bundle has none.

    Raises:
        BundleError: naming the file, the rule and what was found.
    """
    if package is None:
        mlx.check_mlx(bundle)
    else:
        app.check_app(bundle, package)
