"""Images per minute of `fastvlm map`: in one process, and with workers of a local Ray.

    python -m benchmarks.mapping [BUNDLE] [--images 200] [--workers 1 2] [--runs 3] [--tokens 256]
                                 [--json FILE]

Without BUNDLE, the demo checkpoint is exported first, at 4 bits. The images are its scenes. Each
run writes a file of its own, and the settings take turns. The clock begins with the first row, when
the models are loaded, and ends with the last; the first batch is not counted. With Ray, each worker
has one processor, so give it no more workers than the machine has processors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.answers import CHECKPOINT
from benchmarks.encoder import machine
from fastvlm_mlx.language.sampling import SamplingOptions
from fastvlm_mlx.mapping import Job, Tally, map_folder
from fastvlm_mlx.mapping.rows import Row
from model_export.options import ExportOptions
from model_export.pipeline import export
from model_export.samples import scenes

PROMPT = "Describe the image."


def rate(job: Job, out: Path, workers: int | None) -> float:
    """Images per minute, once the first batch is done."""
    first: tuple[int, float] | None = None

    def progress(tally: Tally, row: Row | None) -> None:
        nonlocal first
        if first is None and tally.new >= job.batch_size:
            first = (tally.new, time.perf_counter())

    tally = map_folder(job, out, ray=workers, progress=progress)
    if first is None or first[0] == tally.new:
        raise SystemExit(f"{tally.new} images are too few: expected more than {job.batch_size}")
    return 60 * (tally.new - first[0]) / (time.perf_counter() - first[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = given.bundle
        if bundle is None:
            bundle = Path(scratch, "bundle")
            export(CHECKPOINT, bundle, ExportOptions.of(llm_bits=4))
        folder = Path(scratch, "images")
        folder.mkdir()
        for seed in range(given.images):
            scenes.generate(seed).draw(256).save(folder / f"{seed:06}.png")
        options = SamplingOptions(max_tokens=given.tokens)
        job = Job(bundle, folder, PROMPT, options)
        rates: dict[str, list[float]] = {}
        for run in range(given.runs):
            for workers in (None, *given.workers):
                name = "one process" if workers is None else f"{workers} workers of Ray"
                found = rate(job, Path(scratch, f"{run}-{workers}.jsonl"), workers)
                rates.setdefault(name, []).append(found)
    print(machine())
    for name, found in rates.items():
        span = f"{min(found):,.0f} to {max(found):,.0f}"
        print(f"{name}: {median(found):,.0f} images per minute ({span})")
    if given.json:
        given.json.write_text(
            json.dumps({"machine": machine(), "images_per_minute": rates}, indent=2)
        )


if __name__ == "__main__":
    main()
