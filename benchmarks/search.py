"""`--llm-bpw` beside what one could have asked for instead, at eight sizes and in both layouts.

    python -m benchmarks.search [CHECKPOINT] [--synthetic 0.5b] [--sizes 3,4.5] [--json FILE]
    python -m benchmarks.search --synthetic 0.5b --keep  # the JSON in results, and docs' table
    python -m benchmarks.search --table  # docs' table from the JSON in results

The checkpoint is the demo's unless another is given, or made with random weights. At or below each
size stand every form for the layers with every form for projector, embedding and head, and mlx-lm's
recipes; of a large model those that nothing else at that size is wider than everywhere. KL
divergences are of the language model alone, in nats, on images that nothing was measured on.

A difference counts as a tie up to 1e-5 nats, at which a token in 10,000 changes its rank at most,
and up to two standard errors of the paired difference over the images: on the demo one place of
an answer makes most of a mean.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.encoder import machine
from benchmarks.synthetic import SIZES, make
from fastvlm_mlx.bundle.config import VisionConfig
from model_export import demo
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer
from model_export.encoder.references import reference_features
from model_export.language.recipes import Scheme
from model_export.options import LAYOUTS, ExportOptions
from model_export.quantization.bits import search, trial
from model_export.quantization.bits.candidates import Candidate, Space, alternatives
from model_export.samples import documents, scenes
from model_export.samples.calibration import load_calibration
from model_export.samples.images import Sample, gate_samples

NAME, PAGE = "search", tables.ROOT / "docs" / "quantization.md"
DEMO = Path(demo.__path__[0]) / "checkpoint"
TARGETS = (2.6, 3.0, 3.55, 4.0, 4.5, 5.5, 6.6, 8.0)
# Drawn for no other purpose: scenes where the encoder is small; one document of each kind beside
# a photograph, where it is large.
FIRST_SEED, UNSEEN, UNSEEN_DOCUMENTS = 500, 32, 4
SMALL_PIXELS = 512
# Below it, nothing is said of an answer; and standard errors of a paired difference.
TIE_NATS, TIE_ERRORS = 1e-5, 2.0


@dataclass(frozen=True)
class Row:
    """A size in a layout: what the search took, and the best of what else there is."""

    layout: str
    target: float
    bits_per_weight: float
    taken: str
    predicted: float
    measured: float
    lost: float
    best: str
    best_bits_per_weight: float
    best_lost: float
    worse_than: tuple[str, ...]
    seconds: float


def unseen(vision: VisionConfig) -> list[Sample]:
    """Images with questions that are neither calibration's nor, of scenes, the gates'."""
    size = vision.image_size
    if size > SMALL_PIXELS:
        samples = [sample for sample in gate_samples(vision) if sample.questions]
        for seed in range(FIRST_SEED, FIRST_SEED + UNSEEN_DOCUMENTS):
            document = documents.generate(seed)
            samples.append(Sample(f"document {seed}", document.draw(size), document.questions()))
        return samples
    samples = []
    for seed in range(FIRST_SEED, FIRST_SEED + UNSEEN):
        scene = scenes.generate(seed, held_out=True)
        questions = tuple((q.prompt, q.answer) for q in scene.questions(seed))
        samples.append(Sample(f"scene {seed}", scene.draw(size), questions))
    return samples


def rows(path: Path, group_size: int, targets: Sequence[float], count: int = UNSEEN) -> list[Row]:
    """Every size in every layout.

    Args:
        count: of unseen images, at most.
    """
    checkpoint = Checkpoint(path)
    tokenizer = export_tokenizer(checkpoint)
    calibration = load_calibration(None, checkpoint.config.vision)
    small = checkpoint.config.vision.image_size <= SMALL_PIXELS
    found = []
    others: dict[str, list[Candidate]] = {}
    for layout in LAYOUTS:
        options = ExportOptions.of(group_size=group_size, layout=layout)  # type: ignore[arg-type]
        space = Space(checkpoint.llm_specs, checkpoint.config, options)
        for target in targets:
            started = time.perf_counter()
            taken = search.search(
                checkpoint, tokenizer, calibration, options, target, lambda stage, done: None
            )
            seconds = time.perf_counter() - started
            print(f"{layout} {target:g}: {seconds:.1f} s", file=sys.stderr, flush=True)
            found.append((space, target, taken, seconds))
            others[f"{layout} {target}"] = alternatives(space, target, widest=not small)
    # Each assignment once, whatever size it is beside.
    schemes: dict[tuple[Any, ...], Scheme] = {}
    for each in (c.scheme for candidates in others.values() for c in candidates):
        schemes.setdefault(_id(each), each)
    for _, _, taken, _ in found:
        schemes.setdefault(_id(taken.scheme), taken.scheme)
    samples = unseen(checkpoint.config.vision)[:count]
    references = reference_features(checkpoint.encoder_state(), checkpoint, samples)
    print(f"{len(schemes)} assignments on {len(samples)} images", file=sys.stderr, flush=True)
    started = time.perf_counter()
    lost = trial.divergences(checkpoint, tokenizer, references, list(schemes.values()), "float16")
    places = [each.shape[1] for each in lost]
    print(f"measured in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    losses = dict(zip(schemes, torch.stack([each.sum(1) for each in lost], 1), strict=True))
    return [
        _row(each, others[f"{each[0].options.destination.layout} {each[1]}"], losses, places)
        for each in found
    ]


def _row(
    each: tuple[Space, float, search.SearchResult, float],
    others: Sequence[Candidate],
    losses: dict[tuple[Any, ...], torch.Tensor],
    places: Sequence[int],
) -> Row:
    space, target, found, seconds = each
    total = sum(places)
    ours = losses[_id(found.scheme)]
    by_loss = sorted(others, key=lambda c: float(losses[_id(c.scheme)].sum()))
    best = by_loss[0]
    return Row(
        layout=space.options.destination.layout,
        target=target,
        bits_per_weight=space.bits_per_weight(space.size(found.scheme)),
        taken=found.taken.name,
        predicted=found.taken.predicted_kl_nats,
        measured=found.taken.measured_kl_nats,
        lost=float(ours.sum()) / total,
        best=best.name,
        best_bits_per_weight=space.bits_per_weight(best.bytes),
        best_lost=float(losses[_id(best.scheme)].sum()) / total,
        worse_than=tuple(c.name for c in by_loss if worse(ours, losses[_id(c.scheme)], places)),
        seconds=seconds,
    )


def worse(ours: torch.Tensor, theirs: torch.Tensor, places: Sequence[int]) -> bool:
    """Whether more than a tie is lost; sums over each image's places, [images]."""
    difference = ours - theirs
    total = sum(places)
    mean = float(difference.sum()) / total
    error = float(difference.std()) * len(places) ** 0.5 / total if len(places) > 1 else 0.0
    return mean > TIE_NATS and mean > TIE_ERRORS * error


def _id(scheme: Scheme) -> tuple[Any, ...]:
    return tuple(sorted(scheme.items(), key=lambda item: item[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--synthetic", choices=SIZES, help="random weights of this size instead")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--sizes", help="bits per weight with commas between, in place of eight")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="write the JSON and the page's table")
    parser.add_argument("--table", action="store_true", help="write the table from the JSON")
    arguments = parser.parse_args()
    if arguments.table:
        tables.put(PAGE, NAME, table(tables.read(NAME)))
        return
    targets = [float(t) for t in arguments.sizes.split(",")] if arguments.sizes else TARGETS
    with tempfile.TemporaryDirectory() as temporary:
        # What an earlier search has measured lies in the cache; this one is timed.
        os.environ["XDG_CACHE_HOME"] = temporary
        checkpoint = arguments.checkpoint
        if arguments.synthetic:
            checkpoint = Path(temporary) / "checkpoint"
            make(checkpoint, arguments.synthetic)
        found = rows(checkpoint, arguments.group_size, targets)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    print(f"{platform.platform()}, {os.cpu_count()} cores, {checkpoint}")
    print(
        "| layout | size | the search takes | bits | predicted | measured | loses, unseen "
        "| best of the others | bits | loses, unseen | worse than | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row.layout} | {row.target:g} | {row.taken} | {row.bits_per_weight:.3f} "
            f"| {row.predicted:.2g} | {row.measured:.2g} | {row.lost:.2g} | {row.best} "
            f"| {row.best_bits_per_weight:.3f} | {row.best_lost:.2g} "
            f"| {', '.join(row.worse_than) or 'none'} | {row.seconds:.1f} |"
        )
    print(f"{peak / 1e9:.2f} GB resident at the peak; what one search measured the next ones reuse")
    # Without the paths of this machine.
    source = f"synthetic {arguments.synthetic}" if arguments.synthetic else checkpoint.name
    result = {
        "machine": machine(),
        "checkpoint": source,
        "peak_bytes": peak,
        "rows": [vars(row) for row in found],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.keep:
        tables.keep(NAME, result)
        tables.put(PAGE, NAME, table(result))


def table(result: dict[str, Any]) -> str:
    """What the page shows: KL divergences of both layouts, and what is better beyond a tie."""
    rows = {(row["layout"], row["target"]): row for row in result["rows"]}
    header = ["bits per weight"]
    for layout in LAYOUTS:
        header += [f"{layout}: the search", f"{layout}: the best other", "better beyond a tie"]
    lines = []
    for target in dict.fromkeys(target for _, target in rows):
        cells = [f"{target:g}"]
        for layout in LAYOUTS:
            row = rows[layout, target]
            cells += [f"{row['lost']:.2g}", f"{row['best_lost']:.2g}"]
            cells.append(", ".join(row["worse_than"]) or "none")
        lines.append(cells)
    return tables.markdown(header, lines)


if __name__ == "__main__":
    main()
