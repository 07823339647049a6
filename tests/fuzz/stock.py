"""The undamaged things that cases are made from: bundles, checkpoints, and what lies outside."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
DEMO = TESTS.parent / "model_export" / "demo" / "checkpoint"
# Turns up in an output only if a file outside of a case was read.
SECRET = "fuzz-secret-9c1d27f0"
PROMPT = "What is in the picture?"
LAYOUTS = ("app", "mlx")
# Of a blob in a package's weights.
_SENTINEL = b"\xef\xbe\xad\xde"


@dataclass(frozen=True)
class Stock:
    """Where each lies: `app` and `mlx` are bundles, `other-…` the same with other weights,
    `apple`, `transformers`, `pickled`, `shards`, `lora`, `trained`, `projector` are checkpoints.
    `compact`, a bundle whose encoder has compressed weights and two sizes, is not always there."""

    directory: Path

    def __truediv__(self, name: str) -> Path:
        return self.directory / name

    @property
    def outside(self) -> Path:
        """What no case may reach: a secret, and whole copies of a bundle and a checkpoint."""
        return self.directory / "outside"

    @classmethod
    def make(cls, directory: Path, bundles: dict[str, Path] | None = None) -> Stock:
        """Fill an empty directory; `bundles` by layout, where they have been exported already."""
        stock = cls(directory)
        for layout in LAYOUTS:
            if bundles:
                shutil.copytree(bundles[layout], stock / layout)
            else:
                _export(stock / layout, layout)
            _other(stock / layout, stock / f"other-{layout}")
        if not bundles:
            _compact(stock / "compact")
        for name in ("apple", "transformers"):
            shutil.copytree(TESTS / "golden" / name, stock / name)
        shutil.copytree(TESTS / "golden" / "images", stock / "images")
        _pickled(stock / "apple", stock / "pickled")
        _shards(stock / "transformers", stock / "shards")
        _lora(stock / "apple", stock / "lora")
        _trained(stock / "apple", stock / "lora", stock / "trained")
        _projector(stock / "apple", stock / "projector")
        stock.outside.mkdir()
        (stock.outside / "secret.txt").write_text(SECRET)
        for name in ("app", "mlx", "apple"):
            shutil.copytree(stock / name, stock.outside / name)
        return stock


def _export(out: Path, layout: str) -> None:
    from model_export.options import ExportOptions
    from model_export.pipeline import export

    export(DEMO, out, ExportOptions.of(llm_bits=4, layout=layout))  # type: ignore[arg-type]


def _compact(out: Path) -> None:
    from model_export.options import ExportOptions
    from model_export.pipeline import export

    options = ExportOptions.of(
        llm_bits=4, encoder_precision="int8", image_sizes=(128, 256), allow_failed_gates=True
    )
    export(DEMO, out, options)


def _other(bundle: Path, out: Path) -> None:
    """The same architecture with weights of its own, whole by its manifest."""
    import mlx.core as mx

    shutil.copytree(bundle, out)
    weights = out / "model.safetensors"
    tensors: Any = dict(mx.load(str(weights)))
    scales = [n for n in tensors if n.startswith("language_model") and n.endswith(".scales")]
    for name in scales[: len(scales) // 2]:
        tensors[name] = -tensors[name]
    mx.save_safetensors(str(weights), tensors)
    for blob in out.rglob("weight.bin"):
        data = bytearray(blob.read_bytes())
        # Signs of half-precision weights; each blob begins with a header of 64 bytes.
        starts = [at for at in range(64, len(data), 64) if data[at : at + 4] == _SENTINEL]
        for first, last in pairwise(starts[len(starts) // 2 :]):
            for at in range(first + 65, last, 2):
                data[at] ^= 0x80
        blob.write_bytes(data)
    rehash(out)


def rehash(bundle: Path) -> None:
    """Make the manifest list what the files are now, as an attacker would."""
    file = bundle / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        for name, entry in manifest["files"].items():
            path = bundle / name
            if path.is_file():
                data = path.read_bytes()
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        file.write_text(json.dumps(manifest))
    # The manifest itself is what was damaged.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return


def _pickled(source: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, out)
    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()


def _shards(source: Path, out: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    state = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save_file({name: state[name] for name in half}, out / file)
    where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def _lora(base: Path, out: Path) -> None:
    shutil.copytree(TESTS / "golden_lora" / "rslora", out)
    (out / "merged.npz").unlink()
    file = out / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))


def _projector_state(base: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    state = load_file(base / "model.safetensors")
    return {name: -tensor for name, tensor in state.items() if "mm_projector" in name}


def _trained(base: Path, adapter: Path, out: Path) -> None:
    """An adapter as LLaVA's training leaves it: pickled, and a projector beside it."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(adapter, out)
    file = out / "adapter_model.safetensors"
    torch.save(load_file(file), out / "adapter_model.bin")
    file.unlink()
    state = _projector_state(base)
    extra = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    torch.save(extra, out / "non_lora_trainables.bin")


def _projector(base: Path, out: Path) -> None:
    import torch

    out.mkdir()
    torch.save(_projector_state(base), out / "mm_projector.bin")
    config = json.loads((base / "config.json").read_text())
    text = json.dumps({**config, "_name_or_path": str(base)})
    (out / "config.json").write_text(text)


def scene_image() -> Any:
    """A scene that the demo's bundles have something to say about."""
    from model_export.samples import scenes

    return scenes.generate(18, held_out=True).draw(256)


def answer(bundle: Path, **options: Any) -> tuple[int, ...]:
    """What a bundle says of that scene, as ids; greedy."""
    import fastvlm_mlx

    found = fastvlm_mlx.load(bundle).generate(scene_image(), PROMPT, max_tokens=6, **options)
    return found.tokens


def expected(stock: Stock) -> dict[str, tuple[int, ...]]:
    """The undamaged bundles' answers by name; all different, or nothing can be told by them."""
    return _cached(stock, lambda name: answer(stock / name))


_ANSWERS: dict[Path, dict[str, tuple[int, ...]]] = {}


def _cached(stock: Stock, ask: Callable[[str], tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    if stock.directory not in _ANSWERS:
        found = {name: ask(name) for name in ("app", "mlx", "other-app", "other-mlx")}
        if found["app"] == found["other-app"] or found["mlx"] == found["other-mlx"]:
            raise RuntimeError(f"the bundles of the stock answer alike: {found}")
        _ANSWERS[stock.directory] = found
    return _ANSWERS[stock.directory]


def as_in_the_hub(source: Path, cache: Path) -> Path:
    """A copy as huggingface_hub's cache holds it: every file a link to a blob beside it."""
    repository = cache / "models--apple--FastVLM"
    snapshot = repository / "snapshots" / ("a" * 40)
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(f for f in source.rglob("*") if f.is_file())):
        shutil.copyfile(file, blobs / f"{number:040}")
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "/".join([".."] * (len(link.relative_to(repository).parts) - 1))
        link.symlink_to(f"{up}/blobs/{number:040}")
    return snapshot
