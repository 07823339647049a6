"""`fastvlm verify`: every gate of an export, repeated on a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.vision.package import describe
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer, extended
from model_export.encoder.references import references_of_sizes
from model_export.gates.answers import answer_gates
from model_export.gates.encoder import gates_of_sizes
from model_export.gates.gate import Gate, overflow_gates
from model_export.layouts import app, mlx
from model_export.options import PRECISIONS, ExportOptions, GateLimits

if TYPE_CHECKING:
    import torch

    from model_export.encoder.fastvithd import FastViTHD


def verify(
    path: Path,
    checkpoint_path: str | Path | None,
    limits: Mapping[str, Any],
    progress: Callable[[str, float | None], None],
    *,
    base: str | Path | None = None,
    revision: str | None = None,
) -> tuple[Bundle, list[Gate]]:
    """Repeat on a bundle what its export checked: files, layout and, with a checkpoint, the gates.

    Args:
        checkpoint_path, base, revision: as for the export.
        limits: fields of `GateLimits` to judge by in place of the manifest's, where not None.

    Raises:
        BundleError: a file changed, the layout's rules are broken, or another checkpoint is given.
        OptionError: limits without a checkpoint.
    """
    bundle = Bundle.open(path)
    progress("check files", None)
    bundle.check_files()
    progress("check layout", None)
    if bundle.layout == "app":
        app.check_app(bundle, describe(bundle.package))
    else:
        mlx.check_mlx(bundle)
    options = _own_limits(recorded_options(bundle))
    given = {k: v for k, v in limits.items() if v is not None}
    options = replace(options, limits=replace(options.limits, **given))
    other_sizes = _other_sizes(bundle, options)
    if checkpoint_path is None:
        if any(limit is not None for limit in limits.values()):
            raise OptionError(
                "limits are given and no checkpoint to compare the bundle with: add --checkpoint"
            )
        progress("check encoder", None)
        exact = options.encoder_format == "fp32"
        return bundle, [] if exact else overflow_gates(bundle, options, other_sizes)
    from model_export.gates import equality

    progress("checkpoint", None)
    tokenizer = bundle.tokenizer()
    checkpoint = _source(bundle, tokenizer, checkpoint_path, base, revision)
    progress("check tensors", None)
    exact_gates = [equality.settings_gate(checkpoint, bundle)]
    if bundle.manifest is None:
        why = "no manifest says how the tensors were made"
        exact_gates.append(Gate("tensors changed", 0, "", 0, False, left_out=why))
    else:
        made = equality.Made.recorded(bundle.manifest, checkpoint)
        exact_gates.append(equality.tensor_gate(checkpoint, bundle, made))
    progress("reference encoder", None)
    state = checkpoint.encoder_state()
    references = references_of_sizes(state, checkpoint, other_sizes)
    progress("check encoder", None)
    fold = partial(_folded, state, bundle, options)
    gates, features = gates_of_sizes(bundle, fold, references, options)
    del state
    progress("check answers", None)
    seen = references[checkpoint.config.vision.image_size]
    own = export_tokenizer(checkpoint).tokenizer
    is_plain = options.llm.method == "rtn" and all(
        gate.passed and not gate.left_out for gate in exact_gates
    )
    gates += answer_gates(checkpoint, bundle, own, seen, features, options, is_plain=is_plain)
    return bundle, gates + exact_gates


def _folded(
    state: dict[str, torch.Tensor], bundle: Bundle, options: ExportOptions, vision: VisionConfig
) -> FastViTHD:
    """The module that the package was made from: of a conversion's weights, what was left of them
    in the bundle that was converted."""
    import torch

    from model_export.encoder import fastvithd

    if "converted_from" in (bundle.manifest or {}):
        dtype = getattr(torch, options.llm.dtype)
        state = {name: tensor.to(dtype).float() for name, tensor in state.items()}
    return fastvithd.fold(state, vision)


def _other_sizes(bundle: Bundle, options: ExportOptions) -> list[int]:
    """What the encoder takes besides its default size: a package says it, else the manifest."""
    sizes = options.encoder.other_sizes
    if bundle.layout == "app":
        sizes = tuple(describe(bundle.package).functions.values())
    return sorted({*sizes} - {bundle.config.vision.image_size})


def _source(
    bundle: Bundle,
    tokenizer: Tokenizer,
    checkpoint_path: str | Path,
    base: str | Path | None,
    revision: str | None,
) -> Checkpoint:
    """The checkpoint at the bundle's input size, and with its vocabulary.

    It must be the one that the bundle was made from, or, where no manifest says which, at least of
    the same shape.
    """
    checkpoint = Checkpoint(
        checkpoint_path, base=base, revision=revision, image_size=bundle.config.vision.image_size
    )
    rows = bundle.config.text.vocab_size
    if rows >= checkpoint.config.text.vocab_size:
        extended_checkpoint = extended(checkpoint, tokenizer, rows)
        if bundle.manifest is not None:
            same = _hashes(bundle.manifest["source"]) == _hashes(checkpoint.source())
        else:
            tied = {"tie_word_embeddings": checkpoint.tied}
            same = bundle.config.text == replace(extended_checkpoint.config.text, **tied)
        if same:
            return extended_checkpoint
    raise BundleError(
        f"{bundle.path} was not made from {checkpoint.path}, their weights or shapes differ: give "
        "the checkpoint that it was exported from"
    )


def _hashes(source: Mapping[str, Any]) -> list[str]:
    """SHA-256 of every file of a source and of its bases, whatever they are called."""
    own = sorted(entry["sha256"] for entry in source["files"].values())
    return own + (_hashes(source["base"]) if "base" in source else [])


def _own_limits(recorded: ExportOptions) -> ExportOptions:
    """By our limits, whatever a bundle says of itself; but for a stricter one of the encoder's."""
    ours = replace(recorded, limits=GateLimits())
    strict = max(recorded.snr_floor_db, ours.snr_floor_db)
    return replace(ours, limits=GateLimits(min_snr_db=strict))


def recorded_options(bundle: Bundle) -> ExportOptions:
    """Read the options that a bundle was made with from its manifest, or else from its files."""
    if bundle.manifest is not None:
        return ExportOptions.from_record(bundle.manifest["options"])
    precision = describe(bundle.package).precision if bundle.layout == "app" else "fp16"
    return ExportOptions.of(
        dtype=bundle.config.dtype,  # type: ignore[arg-type]
        encoder_precision=precision if precision in PRECISIONS else "fp16",  # type: ignore[arg-type]
        layout=bundle.layout,  # type: ignore[arg-type]
    )
