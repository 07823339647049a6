"""What `fastvlm doctor` asks of the exporter: the demo, questions about it, a forecast."""

from __future__ import annotations

import json
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.doctor.report import Exporter, Question
from model_export.samples import scenes

_SEEDS = (18, 3)
_SIDE = 512


def exporter() -> Exporter:
    """Nothing of it imports what may not be installed before it is called."""
    return Exporter(export_demo, is_demo, questions, forecast)


def export_demo(path: Path) -> None:
    """Export the checkpoint that ships, as most will. Errors as `pipeline.export`."""
    from model_export.options import ExportOptions
    from model_export.pipeline import export

    with as_file(files("model_export.demo") / "checkpoint") as checkpoint:
        export(checkpoint, path, ExportOptions.of(llm_bits=4))


def is_demo(bundle: Bundle) -> bool:
    """By its words, which no other model has: a bundle may have lost its manifest.

    Raises:
        BundleError: its tokenizer can't be read.
    """
    text = (files("model_export.demo") / "checkpoint" / "vocab.json").read_text(encoding="utf-8")
    shipped: dict[str, int] = json.loads(text)
    found = bundle.tokenizer().get_vocab()
    return len(found) < 2 * len(shipped) and shipped.items() <= found.items()


def questions() -> list[Question]:
    """About scenes that the demo's training never showed: each kind once, for each scene."""
    asked = []
    for seed in _SEEDS:
        scene = scenes.generate(seed, held_out=True)
        image = scene.draw(_SIDE)
        for question in {q.kind: q for q in reversed(scene.questions(seed))}.values():
            judge = partial(scenes.is_right, question)
            asked.append(Question(image, question.prompt, judge))
    return asked


def forecast(path: Path, chip: str) -> dict[str, Any]:
    """As `fastvlm plan BUNDLE --device CHIP --json` prints it.

    Raises:
        OptionError: nothing is published about that chip.
        ModuleNotFoundError: the forecast needs the export extra.
    """
    from model_export.planning.plan import run

    return run(path, chip, None)[0]
