"""Draws the two figures of the README: a scene with questions and answers, and size against loss.

`python -m benchmarks.figures` runs `fastvlm demo` and `fastvlm sweep` on the checkpoint that ships
with the package, and writes `docs/images/answer.png` and `docs/images/sweep.png`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import fastvlm_mlx

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "model_export" / "demo" / "checkpoint"
QUESTIONS = ("Describe the image.", "How many shapes are there?", "What is the number?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        fastvlm("demo", work / "demo")
        draw_answers(work / "demo" / "bundle", work / "demo" / "scene.png", out / "answer.png")
        plot = ("--plot", out / "sweep.png")
        fastvlm("sweep", CHECKPOINT, "--out", work / "sweep", *plot)


def fastvlm(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "fastvlm_mlx", *map(str, arguments)], check=True)


def draw_answers(bundle: Path, scene: Path, file: Path) -> None:
    """Ask a bundle about a scene, and draw the scene beside what was asked and answered."""
    model = fastvlm_mlx.load(bundle)
    features = model.encode(scene)
    answers = [model.generate(features, question).text for question in QUESTIONS]
    draw_dialogue(scene, list(zip(QUESTIONS, answers, strict=True)), file)


def draw_dialogue(scene: Path, dialogue: Sequence[tuple[str, str]], file: Path) -> None:
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(8, 3))
    with Image.open(scene) as image:
        left = figure.add_axes((0.01, 0.03, 0.35, 0.94))
        left.imshow(image.convert("RGB"))
    left.set_axis_off()
    right = figure.add_axes((0.39, 0.03, 0.6, 0.94))
    right.set_axis_off()
    lines = []
    for question, answer in dialogue:
        lines.append((question, "0.45"))
        lines += [(line, "black") for line in textwrap.wrap(answer, 56)]
        lines.append(("", "black"))
    for number, (text, colour) in enumerate(lines[:-1]):
        height = 1 - (number + 0.5) / len(lines[:-1])
        right.text(0, height, text, color=colour, fontsize=11, va="center", parse_math=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
