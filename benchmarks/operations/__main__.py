"""`python -m benchmarks.operations --mlx-vlm PYTHON`: count, beside mlx-vlm's encoder in PYTHON.

Where PYTHON is left out, mlx-vlm is installed into an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks import tables
from benchmarks.operations import trace
from benchmarks.operations.count import Total, total
from benchmarks.peers.environments import DEFAULT, python_of
from fastvlm_mlx.bundle.bundle import ENCODER_PREFIX
from fastvlm_mlx.bundle.config import VisionConfig
from fastvlm_mlx.vision.fastvithd import Backend, FastViTHD
from model_export.checkpoint.names import mlx_encoder_specs

NAME = "operations"
PEER, OURS = "mlx-vlm", "ours"
DEVICES: tuple[tuple[Backend, str], ...] = (("metal", "Metal"), ("cuda", "CUDA"))


def encoder_of_zeros(config: VisionConfig, device: Backend) -> FastViTHD:
    """Our encoder, in float16, as it runs on a device that need not be here."""
    arrays = {
        spec.name.removeprefix(ENCODER_PREFIX): mx.zeros(spec.shape, mx.float16)
        for spec in mlx_encoder_specs(config)
    }
    return FastViTHD(arrays, config, dtype=mx.float16, device=device)


def ours(config: VisionConfig, device: Backend) -> list[trace.Traced]:
    """What it computes of one image."""
    side = config.image_size
    image = mx.zeros((1, side, side, 3), mx.float16)
    return trace.trace(encoder_of_zeros(config, device).graph, image)


def mlx_vlm(python: str, size: int) -> list[trace.Traced]:
    """mlx-vlm's, traced by a Python that has it."""
    command = [python, str(Path(trace.__file__)), str(size)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    graph: list[trace.Traced] = json.loads(found.stdout)
    return graph


def count(size: int, python: str) -> dict[str, Any]:
    """Everything, as one JSON object."""
    peer = mlx_vlm(python, size)
    rows: dict[str, dict[str, Total]] = {}
    for device, name in DEVICES:
        graph = ours(VisionConfig(image_size=size), device)
        rows[name] = {
            PEER: total(peer, device, compiled=False),
            OURS: total(graph, device, compiled=True),
        }
    return {
        "image_size": size,
        "dtype": "float16",
        "devices": {
            name: {who: asdict(found) for who, found in row.items()} for name, row in rows.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    header = (
        f"one image at {result['image_size']}×{result['image_size']}, {result['dtype']}",
        "operations",
        "GB read and written",
        "multiply-accumulates, billions",
        "depthwise convolutions that Metal's kernel does not take",
    )
    rows = [
        (
            f"{who}, {device}",
            f"{found['operations']:,}",
            f"{found['bytes'] / 1e9:.2f}",
            f"{found['macs'] / 1e9:.1f}",
            str(found["slow_convolutions"]) if device == "Metal" else "",
        )
        for device, row in result["devices"].items()
        for who, found in row.items()
    ]
    return tables.markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what the encoder in MLX does.")
    parser.add_argument("--size", type=int, default=1024, help="pixels of one side")
    parser.add_argument("--mlx-vlm", metavar="PYTHON", help="an interpreter that has mlx-vlm")
    parser.add_argument("--environments", type=Path, default=DEFAULT, metavar="DIRECTORY")
    parser.add_argument("--keep", action="store_true", help="write the JSON and the page's table")
    parser.add_argument("--table", action="store_true", help="write the table from the JSON")
    options = parser.parse_args()
    if options.table:
        tables.put(tables.MEASURED, NAME, table(tables.read(NAME)))
        return
    python = python_of(PEER, options.mlx_vlm, options.environments)
    result = count(options.size, python)
    print(table(result), end="")
    if options.keep:
        tables.keep(NAME, result)
        tables.put(tables.MEASURED, NAME, table(result))


if __name__ == "__main__":
    main()
