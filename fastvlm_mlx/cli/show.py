"""What the command line shows of a bundle, a checkpoint and an answer; progress on stderr."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.config import fits_mlx_vlm
from fastvlm_mlx.bundle.kind import is_bundle
from fastvlm_mlx.bundle.manifest import MANIFEST
from fastvlm_mlx.errors import BundleError, printable
from fastvlm_mlx.vision.package import IMAGE, describe, fits_app

if TYPE_CHECKING:
    from fastvlm_mlx.language.generate import GenerationResult

_stderr = Console(stderr=True)
_stdout = Console()

# All but the line's end and the tab, as Python writes them.
_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if c not in (9, 10)}
# In these huggingface_hub may draw bars of its own, with bytes and speed: none of ours meanwhile.
HUB_STAGES = ("checkpoint", "upload")


@contextmanager
def stages() -> Iterator[Callable[[str, float | None], None]]:
    """A progress callback for long work: a bar on a terminal, a line for each stage elsewhere."""
    if not _stderr.is_terminal:
        yield _lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=_stderr)
    current: tuple[str, Any] = ("", None)

    def show(stage: str, done: float | None) -> None:
        nonlocal current
        if stage != current[0]:
            finish()
            task = None
            if stage in HUB_STAGES:
                pause()
            else:
                progress.start()
                task = progress.add_task(stage, total=None if done is None else 1)
            current = (stage, task)
        if done is not None and current[1] is not None:
            progress.update(current[1], completed=done)

    def finish() -> None:
        if current[1] is not None:
            progress.update(current[1], total=1, completed=1)

    def pause() -> None:
        progress.stop()
        # What is above has been printed for good.
        for task in progress.task_ids:
            progress.remove_task(task)

    try:
        yield show
        finish()
    finally:
        progress.stop()


def _lines() -> Callable[[str, float | None], None]:
    last = ""
    started = time.perf_counter()

    def show(stage: str, done: float | None) -> None:
        nonlocal last
        if stage != last:
            last = stage
            note(f"{time.perf_counter() - started:6.1f} s  {stage}")

    return show


def note(text: str) -> None:
    _stderr.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def note_padding(path: Path) -> None:
    """Say so if mlx-vlm, which pads every image, will answer otherwise than the checkpoint."""
    bundle = Bundle.open(path)
    found = bundle.config.image_aspect_ratio
    if bundle.layout == "mlx" and found != "pad":
        note(
            f"image_aspect_ratio is {found!r} and mlx-vlm pads every image: its answers about "
            "images that are not square will differ from the checkpoint's and from fastvlm's"
        )


def answer(text: str) -> str:
    """What a model says, for a terminal: whoever made it, it gives the terminal no commands."""
    return text.translate(_CONTROLS)


def timing_line(result: GenerationResult) -> str:
    """One line: counts, seconds of each stage, speed, memory."""
    t = result.timings
    return (
        f"{result.image_tokens} image + {result.prompt_tokens - result.image_tokens} text tokens | "
        f"load {t.load_s:.2f} s | preprocess {t.preprocess_s:.3f} | encode {t.encode_s:.3f} | "
        f"project {t.project_s:.3f} | prefill {t.prefill_s:.3f} | TTFT {t.ttft_s:.3f} s | "
        f"{result.generation_tokens} tokens in {t.decode_s:.3f} s ({t.tokens_per_s:.1f}/s) | "
        f"peak {result.peak_memory_bytes / 1e9:.2f} GB | {result.compute}"
    )


def inspect(path: Path) -> dict[str, Any]:
    """What is at `path`: a bundle's facts or a checkpoint's.

    Raises:
        BundleError, CheckpointError, ConfigError: it is neither, or can't be read.
    """
    try:
        path = Path(path).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no path"
        raise BundleError(f"{path!r} can't be opened as a path ({reason})") from error
    if not exists:
        raise BundleError(
            f"{path} does not exist: expected a bundle's or a checkpoint's directory; a hub id is "
            "for `fastvlm export`"
        )
    return inspect_bundle(path) if is_bundle(path) else inspect_checkpoint(path)


def inspect_bundle(path: Path) -> dict[str, Any]:
    """Sizes by part, bits per weight, encoder, gates, licence. From the files, not the manifest."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest or {}
    encoder = _package_facts(bundle) if bundle.layout == "app" else _mlx_encoder_facts(bundle)
    package_license = encoder.pop("license", None)
    sizes = _llm_sizes(bundle)
    return {
        "kind": "bundle",
        "path": str(path),
        "source": manifest.get("source", {}).get("name"),
        **_converted_from(manifest),
        "license": manifest.get("source", {}).get("license") or package_license,
        "layout": bundle.layout,
        "encoder": encoder,
        "llm": {
            **_formats(bundle, sizes["bits_per_weight"]),
            **_method(manifest),
            "dtype": bundle.config.dtype,
            "layers": bundle.config.text.num_hidden_layers,
            "hidden_size": bundle.config.text.hidden_size,
            **sizes,
        },
        "total_bytes": sum(stamp.bytes for stamp in bundle.stamps.values()),
        "image_aspect_ratio": bundle.config.image_aspect_ratio,
        **_fits(bundle),
        "gates": manifest.get("gates"),
        "gates_passed": manifest.get("gates_passed"),
    }


def _converted_from(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the gates compare with, where it is a bundle and not the source."""
    converted = manifest.get("converted_from")
    if converted is None:
        return {}
    return {"converted_from": {key: converted[key] for key in ("directory", "layout")}}


def _fits(bundle: Bundle) -> dict[str, Any]:
    if bundle.layout == "app":
        return fits_app(describe(bundle.package))
    return fits_mlx_vlm(bundle.config.vision)


def _package_facts(bundle: Bundle) -> dict[str, Any]:
    info, vision = describe(bundle.package), bundle.config.vision
    shapes = info.outputs[0].shape
    return {
        "license": info.license or None,
        "package": bundle.package.name,
        "precision": info.precision,
        "image_size": info.inputs[0].shape[-1] if info.inputs[0].shape else vision.image_size,
        "tokens_per_image": shapes[1] if len(shapes) == 3 else vision.num_tokens,
        "channels": vision.hidden_size,
        "deployment_target": info.deployment_target,
        "bytes": info.bytes,
        **_sizes(list(info.functions.values())),
        **({"image_input": True} if info.inputs[0].dtype == IMAGE else {}),
    }


def _sizes(image_sizes: list[int]) -> dict[str, Any]:
    """Only of an encoder that was exported for several."""
    return {"image_sizes": sorted(image_sizes)} if len(image_sizes) > 1 else {}


def _mlx_encoder_facts(bundle: Bundle) -> dict[str, Any]:
    arrays, vision = bundle.encoder_arrays(), bundle.config.vision
    dtypes = sorted({str(array.dtype).removeprefix("mlx.core.") for array in arrays.values()})
    return {
        "precision": ", ".join(dtypes),
        "image_size": vision.image_size,
        "tokens_per_image": vision.num_tokens,
        "channels": vision.hidden_size,
        "bytes": sum(array.nbytes for array in arrays.values()),
        **_sizes((bundle.manifest or {}).get("encoder", {}).get("image_sizes", [])),
    }


def _llm_sizes(bundle: Bundle) -> dict[str, Any]:
    """Bytes by part, and bits per weight of the parameters that they stand for."""
    parts: Counter[str] = Counter()
    parameters = 0
    tensors = bundle.model_tensors()
    for name, array in tensors.items():
        parts[_part(name)] += array.nbytes
        stem, _, kind = name.rpartition(".")
        stored = bundle.format_of(stem) if f"{stem}.scales" in tensors else None
        if stored is not None and kind == "weight":
            parameters += array.size * 32 // stored.bits
        elif kind not in ("scales", "biases"):
            parameters += array.size
    total = sum(parts.values())
    return {
        "parameters": parameters,
        "bytes": total,
        "bits_per_weight": round(8 * total / parameters, 3),
        "bytes_by_part": dict(sorted(parts.items())),
    }


def _formats(bundle: Bundle, bits_per_weight: float) -> dict[str, Any]:
    """One format's bits and group size; of several, which there are."""
    quantization = bundle.config.quantization
    if quantization is None:
        return {"bits": bits_per_weight, "group_size": None}
    if len(quantization.formats()) == 1 and quantization.default.mode == "affine":
        return {"bits": quantization.default.bits, "group_size": quantization.default.group_size}
    return {"formats": ", ".join(sorted(str(stored) for stored in quantization.formats()))}


def _method(manifest: dict[str, Any]) -> dict[str, Any]:
    calibration = manifest.get("llm", {}).get("calibration")
    if calibration is None:
        return {}
    return {"method": calibration["method"], "calibration_images": calibration["images"]}


def _part(name: str) -> str:
    for part in ("multi_modal_projector", "embed_tokens", "lm_head"):
        if part in name:
            return part
    return "layers" if ".layers." in name else "other"


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's facts, from its headers; nothing is read but the head, if it has one."""
    from model_export.checkpoint.checkpoint import Checkpoint

    checkpoint = Checkpoint(path)
    config = checkpoint.config
    dtypes = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    return {
        "kind": "checkpoint",
        "path": str(path),
        "source": checkpoint.name,
        "stored_as": checkpoint.kind,
        "license": checkpoint.license,
        "encoder": {
            "parameters": checkpoint.encoder_parameters,
            "image_size": config.vision.image_size,
            "tokens_per_image": config.vision.num_tokens,
            "channels": config.vision.hidden_size,
        },
        "llm": {
            "parameters": checkpoint.llm_parameters,
            "layers": config.text.num_hidden_layers,
            "hidden_size": config.text.hidden_size,
            "vocab_size": config.text.vocab_size,
            "tie_word_embeddings": checkpoint.tied,
        },
        "dtypes": dict(dtypes),
        "files": len(checkpoint.weight_files),
        "total_bytes": sum(file.stat().st_size for file in checkpoint.weight_files),
        "image_aspect_ratio": config.image_aspect_ratio,
    }


def print_bundle(facts: dict[str, Any]) -> None:
    """Facts of `inspect` as a table, nested ones with their group's name."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        if key == "gates":
            continue
        if isinstance(value, dict):
            for inner, entry in value.items():
                if isinstance(entry, dict):
                    entry = ", ".join(f"{k} {_shown('bytes', v)}" for k, v in entry.items())
                table.add_row(*_cells(f"{key} {inner}".replace("_", " "), _shown(inner, entry)))
        else:
            table.add_row(*_cells(key.replace("_", " "), _shown(key, value)))
    _stdout.print(table, soft_wrap=True)
    if facts.get("gates"):
        print_gates(facts["gates"])


def print_checks(bundle: Bundle) -> None:
    """What `verify` has checked before any gate, as its manifest and its layout say it."""
    files = f"{len(bundle.files) - 1} as {MANIFEST} lists them, by size and SHA-256"
    if bundle.manifest is None:
        files = f"not compared, there is no {MANIFEST}"
    table = Table("check", "", box=None, pad_edge=False)
    table.add_row("files", files)
    table.add_row("layout", f"{bundle.layout}, by the rules of the programs that load it")
    _stdout.print(table, soft_wrap=True)


def print_gates(gates: list[dict[str, Any]]) -> None:
    table = Table("gate", "measured", "limit", "", box=None, pad_edge=False)
    for gate in gates:
        table.add_row(*_cells(*gate_cells(gate)))
    _stdout.print(table)


def _cells(*texts: str) -> list[Text]:
    """What may be somebody else's text, as it is: neither markup nor an escape for the terminal."""
    return [Text(printable(text)) for text in texts]


def gate_cells(gate: dict[str, Any]) -> tuple[str, str, str, str]:
    """A gate of a manifest as it is shown: name, figure, limit, whether it passed."""
    value = f"{float(gate['value']):.4g} {gate['unit']}"
    limit = f"{'≥' if gate['at_least'] else '≤'} {gate['limit']:g} {gate['unit']}"
    judged = "passed" if gate["passed"] else "FAILED"
    return gate["name"], value, limit, "not judged" if gate.get("left_out") else judged


def shown_bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if key.endswith("bytes"):
        return shown_bytes(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
