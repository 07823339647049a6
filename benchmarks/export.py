"""Time and peak memory of a whole export, gates included, at the real sizes.

    python -m benchmarks.export [--size 0.5b] [--llm-bits 4] [--runs 1] [--json FILE]

A synthetic checkpoint (random weights, Apple's layout) is written once, then `fastvlm export`
runs as a process of its own, so that what is measured is what a user pays: seconds from start to
exit, and the process's peak resident memory as the operating system accounts for it. Beside it, in
the same run, a plain copy of the checkpoint's bytes shows what the disk alone costs.
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

from benchmarks.synthetic import write_checkpoint


def measure(command: list[str]) -> dict[str, float]:
    """Run a command to its end: wall seconds, CPU seconds, peak resident bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
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
        "stages": log,  # type: ignore[dict-item]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--size", default="0.5b", choices=("0.5b", "1.5b", "7b"))
    parser.add_argument("--llm-bits", type=int, default=4)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="use (or make) the checkpoint here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = arguments.checkpoint or Path(temporary) / "checkpoint"
        if not (checkpoint / "config.json").exists():
            write_checkpoint(checkpoint, arguments.size)
        out = Path(temporary) / "bundle"
        runs, copies = [], []
        for _ in range(arguments.runs):
            started = time.perf_counter()
            shutil.copytree(checkpoint, Path(temporary) / "copy")
            copies.append(time.perf_counter() - started)
            shutil.rmtree(Path(temporary) / "copy")
            command = [sys.executable, "-m", "fastvlm_mlx", "export", str(checkpoint), str(out)]
            command += ["--llm-bits", str(arguments.llm_bits), "--overwrite"]
            runs.append(measure(command))
        manifest = json.loads((out / "manifest.json").read_text())
    result = {
        "size": arguments.size,
        "llm_bits": arguments.llm_bits,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "mlx", "coremltools", "numpy")},
        "seconds": statistics.median(run["seconds"] for run in runs),
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "copy_seconds": statistics.median(copies),
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
    print(
        f"  {result['seconds'] / result['copy_seconds']:.1f} times a plain copy of the checkpoint"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
