"""`--llm-bpw` beside mlx-lm's mixed recipes: what each loses at the same size, and what it takes.

    python -m benchmarks.search [CHECKPOINT] [--synthetic 0.5b] [--json FILE]

The checkpoint is the demo's unless another is given, or made with random weights. Sensitivities are
measured anew, once; then for each recipe the assignment of bits of no more than its size is found.
KL divergences are of the language model alone, in nats, on the gates' pictures: none was measured
on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.synthetic import SIZES, make
from model_export import judge, llm, qwen2, recipes, search
from model_export.calibration import load_calibration
from model_export.checkpoint import Checkpoint
from model_export.demo import scenes
from model_export.options import ExportOptions
from model_export.pictures import gate_pictures, reference_features
from model_export.recipes import Scheme
from model_export.tokenizer import export_tokenizer

DEMO = Path(scenes.__file__).parent / "checkpoint"


def bits_per_weight(checkpoint: Checkpoint, chosen: Scheme, options: ExportOptions) -> float:
    """Of the language model and the projector; an `mlx` bundle's encoder is not among them."""
    specs = checkpoint.llm_specs
    entries = [e for spec in specs for e in llm.stored(spec, chosen, options.dtype)]
    return 8 * sum(entry.bytes for entry in entries) / sum(prod(spec.shape) for spec in specs)


def rows(path: Path, group_size: int) -> list[dict[str, Any]]:
    """For each recipe its size and what it and the search's assignment lose."""
    checkpoint = Checkpoint(path)
    tokenizer = export_tokenizer(checkpoint)
    source = qwen2.SourceWeights(checkpoint)
    found, candidates = [], []
    for name in recipes.STOCK:
        options = ExportOptions(recipe=name, group_size=group_size, layout="mlx")
        stock = recipes.scheme(checkpoint.llm_specs, checkpoint.config, options)
        target = bits_per_weight(checkpoint, stock, options)
        started = time.perf_counter()
        searched = search.search(
            checkpoint,
            tokenizer,
            load_calibration(None, checkpoint.config.vision),
            ExportOptions(llm_bpw=target, group_size=group_size, layout="mlx"),
            target,
            lambda stage, done: None,
        )
        found.append(
            {
                "recipe": name,
                "bits_per_weight": target,
                "searched_bits_per_weight": bits_per_weight(checkpoint, searched.scheme, options),
                "seconds": time.perf_counter() - started,
            }
        )
        print(f"{name}: {found[-1]['seconds']:.1f} s", file=sys.stderr)
        candidates += [judge.Candidate(source, each) for each in (stock, searched.scheme)]
    pictures = [p for p in gate_pictures(checkpoint.config.vision) if p.questions]
    references = reference_features(checkpoint.encoder_state(), checkpoint, pictures)
    losses = judge.losses(checkpoint, tokenizer, references, candidates)
    for row, stock_kl, kl in zip(found, losses[::2], losses[1::2], strict=True):
        row |= {"recipe_kl_nats": stock_kl, "searched_kl_nats": kl}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--synthetic", choices=SIZES, help="random weights of this size instead")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        # What an earlier search has measured lies in the cache; this one is timed.
        os.environ["XDG_CACHE_HOME"] = temporary
        checkpoint = arguments.checkpoint
        if arguments.synthetic:
            checkpoint = Path(temporary) / "checkpoint"
            make(checkpoint, arguments.synthetic)
        found = rows(checkpoint, arguments.group_size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    print(f"{platform.platform()}, {os.cpu_count()} cores, {checkpoint}")
    print(
        "| recipe | bits per weight | KL, nats | searched: bits per weight | KL, nats | seconds |"
    )
    print("|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row['recipe']} | {row['bits_per_weight']:.3f} | {row['recipe_kl_nats']:.3g} "
            f"| {row['searched_bits_per_weight']:.3f} | {row['searched_kl_nats']:.3g} "
            f"| {row['seconds']:.1f} |"
        )
    print(
        f"{peak / 1e9:.2f} GB resident at the peak; the first search measures, the others reuse it"
    )
    if arguments.json:
        result = {"platform": platform.platform(), "peak_bytes": peak, "rows": found}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
