"""Bundles of other people's making: an exported one, changed, its manifest in agreement again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from fastvlm_mlx.bundle.manifest import MANIFEST, hash_tree


def sign(bundle: Path) -> None:
    """Have the manifest, if there is one, list what is there now."""
    file = bundle / MANIFEST
    if file.is_file():
        manifest = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(manifest | {"files": hash_tree(bundle)}))


def edit_json(
    bundle: Path, name: str, edit: Callable[[Any], None] | None = None, **changes: Any
) -> None:
    """Change a JSON file by a function, or key by key.

    A key `a__b` is inside `a`; None takes a key out.
    """
    data = json.loads((bundle / name).read_text(encoding="utf-8"))
    if edit is not None:
        edit(data)
    for key, value in changes.items():
        *parents, last = key.split("__")
        inside = data
        for parent in parents:
            inside = inside[parent]
        if value is None:
            inside.pop(last, None)
        else:
            inside[last] = value
    (bundle / name).write_text(json.dumps(data), encoding="utf-8")
    if name != MANIFEST:
        sign(bundle)


def edit_weights(bundle: Path, edit: Callable[[dict[str, mx.array]], None]) -> None:
    """Change the tensors of `model.safetensors`."""
    file = bundle / "model.safetensors"
    arrays: Any = mx.load(str(file))
    # Before the file that they lie in is written to.
    mx.eval(list(arrays.values()))
    edit(arrays)
    mx.save_safetensors(str(file), arrays, {"format": "mlx"})
    sign(bundle)
