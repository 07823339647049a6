"""Encoder latency, tokens and time to the first token by resolution, as the paper asks.

    python -m benchmarks.resolution [--bundle DIR] [--runs 3] [--keep] [--plot FILE]
    python -m benchmarks.resolution --table

FastViTHD stands beside ViT-L/14 and ConvNeXt-L at the paper's sizes and, for its largest claim,
SigLIP-SO400M as LLaVA-OneVision uses it; all have random weights and run in torch in float32. One
resolution stands beside 2×2 tiles of half of it with an overview, and multi-scale features beside
none. As in the paper, the time to the first token is the encoder's time and the prefill of the
image's tokens and a short question by the bundle's language model; without `--bundle`, that of
random weights in 0.5B's shapes at 4 bits. Everything takes turns.

`--keep` writes benchmarks/results/resolution.json, from which `--table` makes what
docs/resolution.md shows, its chart included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.load import export
from benchmarks.resolution import report
from benchmarks.resolution.encoders import (
    FASTVITHD,
    SIGLIP,
    SIZES,
    STRIDES,
    TILED,
    build,
    multi_scale,
    tokens,
)
from benchmarks.resolution.prefill import TEXT_TOKENS, Prefill
from fastvlm_mlx.bench.environment import describe, sentence
from fastvlm_mlx.bench.spread import Spread

PAGE = tables.ROOT / "docs" / "resolution.md"
CHART = tables.ROOT / "docs" / "images" / "resolution.png"
MULTI_SCALE_SIZE = 1024
# LLaVA-OneVision cuts 1152×1152 into nine tiles, and encodes an overview too.
ONEVISION_TILES = 10


def main() -> None:
    options = _options()
    if options.table:
        result = tables.read("resolution")
        tables.put(PAGE, "resolution", report.page(result))
        report.draw(result, CHART)
        return
    with tempfile.TemporaryDirectory() as temporary:
        bundle = options.bundle or export(Path(temporary))
        result = measure(bundle, options)
    print(report.tables(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if options.plot:
        report.draw(result, options.plot)
    if options.keep:
        print(tables.keep("resolution", result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="whose language model prefills")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--largest", type=int, default=1536, help="leave larger inputs out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--table", action="store_true", help="write what docs/resolution.md shows")
    return parser.parse_args()


def measure(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON object."""
    machine = describe()
    print(sentence(machine), file=sys.stderr, flush=True)
    sizes = {n: tuple(s for s in kept if s <= options.largest) for n, kept in SIZES.items()}
    halves = [size // 2 for size in TILED if size <= options.largest]
    sizes[FASTVITHD] = tuple(sorted({*sizes[FASTVITHD], *halves}))
    encoders = build(sizes)
    added = multi_scale(min(MULTI_SCALE_SIZE, options.largest)) if options.largest >= 256 else {}
    prefill = Prefill(bundle)
    whole = {(one.name, one.size): tokens(one.name, one.size) for one in encoders}
    tiled = {size: 5 * tokens(FASTVITHD, size // 2) for size in TILED if size <= options.largest}
    counts = {*whole.values(), *tiled.values()}
    onevision = ONEVISION_TILES * tokens(SIGLIP, 384)
    encoder_s: dict[str, list[float]] = {f"{e.name} {e.size}": [] for e in encoders}
    prefill_s: dict[int, list[float]] = {count: [] for count in sorted(counts)}
    added_s: dict[str, list[float]] = {name: [] for name in added}
    # At one size each, which readies weights and memory for all.
    for name in sizes:
        next((one.seconds() for one in encoders if one.name == name), None)
    for call in added.values():
        _seconds(call)
    for number in range(options.runs):
        print(f"round {number + 1} of {options.runs}", file=sys.stderr, flush=True)
        for one in encoders:
            encoder_s[f"{one.name} {one.size}"].append(one.seconds())
        for name, call in added.items():
            added_s[name].append(_seconds(call))
        for count, times in prefill_s.items():
            times.append(prefill.seconds(count + TEXT_TOKENS))
    if (SIGLIP, 384) in whole:
        # Once: it takes as long as all of the others.
        prefill_s[onevision] = [prefill.seconds(onevision + TEXT_TOKENS)]
    return {
        "machine": machine,
        "runs": options.runs,
        "language_model": prefill.compute,
        "text_tokens": TEXT_TOKENS,
        "strides": STRIDES,
        "encoders": [
            {
                "encoder": name,
                "size": size,
                "tokens": count,
                "encode_s": Spread.of(encoder_s[f"{name} {size}"]).to_dict(),
            }
            for (name, size), count in whole.items()
        ],
        "tiles": [
            {"size": size, "tile": size // 2, "encodings": 5, "tokens": count}
            for size, count in tiled.items()
        ],
        "onevision": {"encodings": ONEVISION_TILES, "tokens": onevision},
        "multi_scale": {
            "size": min(MULTI_SCALE_SIZE, options.largest),
            **{name: Spread.of(times).to_dict() for name, times in added_s.items()},
        },
        "prefill_s": {str(count): Spread.of(times).to_dict() for count, times in prefill_s.items()},
    }


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
