"""What AWQ, GPTQ and DWQ gain over plain rounding at the same bits, and what they take.

    python -m benchmarks.quantization [CHECKPOINT] [--synthetic 0.5b] [--bits 4 3 2] [--json FILE]

The checkpoint is the demo's unless another is given, or made with random weights. Each row is one
`fastvlm export`, a process of its own, every gate included; then `fastvlm compare` holds all of
them to the checkpoint, encoder and language model together, on images that nothing was calibrated
on. In brackets is what the bundle has where plain rounding lost less on those that were kept back.
Seconds are the processor's, of both cores, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.export import measure
from benchmarks.synthetic import SIZES, make
from model_export import demo
from model_export.comparison.compare import QUESTIONS, compare
from model_export.options import METHODS

DEMO = Path(demo.__path__[0]) / "checkpoint"


def export(checkpoint: Path, out: Path, bits: int, method: str, rest: list[str]) -> dict[str, Any]:
    """What one export takes."""
    command = [sys.executable, "-m", "fastvlm_mlx", "export", str(checkpoint), str(out)]
    command += ["--llm-bits", str(bits), "--method", method, "--allow-failed-gates", *rest]
    run = measure(command)
    facts = json.loads((out / "manifest.json").read_text())["llm"]
    return {
        "bits": bits,
        "method": method,
        "used": facts.get("calibration", {}).get("method", method),
        "cpu_seconds": run["cpu_seconds"],
        "peak_bytes": run["peak_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--synthetic", choices=SIZES, help="random weights of this size instead")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--json", type=Path)
    # What is not known here is for the export.
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = arguments.checkpoint
        if arguments.synthetic:
            checkpoint = Path(temporary) / "checkpoint"
            make(checkpoint, arguments.synthetic)
        rows = {}
        for bits in arguments.bits:
            for method in arguments.methods:
                out = Path(temporary) / f"{bits}-{method}"
                rows[str(out)] = export(checkpoint, out, bits, method, rest)
                print(f"exported {out.name}", file=sys.stderr)
        compared = compare(
            list(rows), checkpoint, None, arguments.questions, lambda stage, done: None
        )
    print(f"{platform.platform()}, {checkpoint}")
    print("| bits | method | bits per weight | KL, nats | agreement | changed | CPU s | peak GB |")
    print("|---|---|---|---|---|---|---|---|")
    for found in compared:
        if found.reference:
            continue
        row = rows[found.name]
        row |= {key: value for key, value in found.to_dict().items() if key not in ("name", "best")}
        used = "" if row["used"] == row["method"] else f" ({row['used']})"
        print(
            f"| {row['bits']} | {row['method']}{used} | {found.bits_per_weight:.2f} "
            f"| {found.kl_nats:.3g} | {found.agreement:.4f} "
            f"| {found.changed} of {found.questions} "
            f"| {row['cpu_seconds']:.0f} | {row['peak_bytes'] / 1e9:.2f} |"
        )
    if arguments.json:
        result = {"platform": platform.platform(), "rows": list(rows.values())}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
