"""Time and peak memory of a whole export, gates included, at the real sizes.

    python -m benchmarks.export [--size 0.5b] [--llm-bits 4] [--runs 1] [--json FILE]
                                [--peer PYTHON]

A synthetic checkpoint (random weights, Apple's layout) is written once, then `fastvlm export`
runs as a process of its own, so that what is measured is what a user pays: seconds from start to
exit, and the process's peak resident memory as the operating system accounts for it. A checkpoint
on a slow disk measures the disk: `--checkpoint` takes one that lies in memory.

With `--peer`, an interpreter whose environment has mlx-vlm, its own conversion takes turns with
ours. That makes no Core ML encoder and checks nothing, so what it is compared with is the same part
of ours as a process of its own: `model_export.language.llm` writing an `mlx` bundle's tensors, all
of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.synthetic import make
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.language import llm
from model_export.language.recipes import scheme
from model_export.options import ExportOptions


def measure(command: list[str]) -> dict[str, Any]:
    """Run a command to its end: wall seconds, CPU seconds, peak resident bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    log = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{log}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * scale,
        "stages": log,
    }


def middle(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of seconds, the largest peak."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def write_tensors(checkpoint_path: str, out: str, llm_bits: int) -> None:
    """What a conversion without an encoder's package and without checks is of ours."""
    checkpoint = Checkpoint(checkpoint_path)
    options = ExportOptions.of(llm_bits=llm_bits, layout="mlx")
    chosen = scheme(checkpoint.llm_specs, checkpoint.config, options.llm, "mlx")
    Path(out).mkdir()
    llm.write(
        checkpoint,
        chosen,
        options.destination.layout,
        options.llm.dtype,
        Path(out),
        lambda count: None,
    )


def conversions(peer: str, checkpoint: Path, out: Path, llm_bits: int) -> dict[str, list[str]]:
    """The commands that take turns: our tensors alone, and mlx-vlm's whole conversion."""
    source, bits = str(checkpoint), str(llm_bits)
    ours = f"from benchmarks.export import write_tensors as w; w({source!r}, {str(out)!r}, {bits})"
    theirs = ["-m", "mlx_vlm", "convert", "--hf-path", source, "--mlx-path", str(out)]
    theirs += ["-q", "--q-bits", bits, "--q-group-size", "64"]
    return {"ours": [sys.executable, "-c", ours], "mlx-vlm": [peer, *theirs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--size", default="0.5b", choices=("0.5b", "1.5b", "7b"))
    parser.add_argument("--llm-bits", type=int, default=4)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="use (or make) the checkpoint here")
    parser.add_argument("--peer", help="the Python of an environment that has mlx-vlm")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = (arguments.checkpoint or Path(temporary) / "checkpoint").absolute()
        if not (checkpoint / "config.json").exists():
            make(checkpoint, arguments.size)
        out, tensors = Path(temporary) / "bundle", Path(temporary) / "tensors"
        turns: dict[str, list[str]] = {}
        if arguments.peer:
            turns = conversions(arguments.peer, checkpoint, tensors, arguments.llm_bits)
        parts: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
        runs = []
        for _ in range(arguments.runs):
            for name, command in turns.items():
                parts[name].append(measure(command))
                shutil.rmtree(tensors)
            command = [sys.executable, "-m", "fastvlm_mlx", "export", str(checkpoint), str(out)]
            command += ["--llm-bits", str(arguments.llm_bits), "--overwrite"]
            runs.append(measure(command))
        manifest = json.loads((out / "manifest.json").read_text())
    result: dict[str, Any] = {
        "size": arguments.size,
        "llm_bits": arguments.llm_bits,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "mlx", "coremltools", "numpy")},
        **middle(runs),
        "tensors_alone": {name: middle(measured) for name, measured in parts.items()},
        "bundle_bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "bits_per_weight": manifest["llm"]["bits_per_weight"],
        "gates": manifest["gates"],
    }
    print(f"{result['machine']}, {result['cores']} cores, {result['versions']}")
    print(runs[-1]["stages"])
    print(f"export {arguments.size}, fp16 encoder, {arguments.llm_bits}-bit LLM, gates included:")
    print(f"  {result['seconds']:.1f} s wall, {result['cpu_seconds']:.1f} s CPU")
    print(f"  {result['peak_bytes'] / 1e9:.2f} GB peak resident")
    print(
        f"  {result['bundle_bytes'] / 1e6:.0f} MB written, {result['bits_per_weight']} bits/weight"
    )
    for name, figures in result["tensors_alone"].items():
        share = {key: figures[key] / result["tensors_alone"]["mlx-vlm"][key] for key in figures}
        print(
            f"tensors alone, {name}: {figures['seconds']:.1f} s ({share['seconds']:.2f}), "
            f"{figures['peak_bytes'] / 1e9:.2f} GB ({share['peak_bytes']:.2f} of mlx-vlm's)"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
