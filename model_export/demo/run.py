"""`fastvlm demo`: the whole path on the checkpoint that ships with the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.files import is_empty, is_litter
from fastvlm_mlx.cli import show
from fastvlm_mlx.errors import DestinationError, FastVLMError
from fastvlm_mlx.fastvlm import load
from fastvlm_mlx.language.generate import SamplingOptions
from model_export.destination.destination import clear_leftovers
from model_export.gates.verify import verify
from model_export.options import ExportOptions
from model_export.pipeline import export
from model_export.samples import scenes

# What the checkpoint that ships calls itself.
SOURCE = "fastvlm-demo"


def _ours(directory: Path, names: set[str]) -> bool:
    """Whether there is nothing yet, or what an earlier demo made and nothing else."""
    if not directory.exists():
        return True
    if not directory.is_dir():
        return False
    if not {path.name for path in directory.iterdir() if not is_litter(path.name)} <= names:
        return False
    bundle = directory / "bundle"
    if not bundle.exists():
        return is_empty(directory)
    try:
        manifest = Bundle.open(bundle).manifest or {}
    except FastVLMError:
        return False
    return manifest.get("source", {}).get("name") == SOURCE


def run_demo(directory: Path, *, seed: int, llm_bits: int) -> None:
    """Export, verify, draw, ask; everything in `directory`, which is named at the end.

    Raises:
        DestinationError: `directory` holds something that the demo did not make.
    """
    bundle, image = directory / "bundle", directory / "scene.png"
    clear_leftovers(directory)
    if not _ours(directory, {bundle.name, image.name}):
        raise DestinationError(
            f"{directory} exists and is not an earlier demo's: name another directory"
        )
    options = ExportOptions.of(llm_bits=llm_bits, overwrite=True)
    shipped = files("model_export.demo") / "checkpoint"
    with as_file(shipped) as checkpoint, show.stages() as progress:
        export(checkpoint, bundle, options, progress)
        _, gates = verify(bundle, checkpoint, {}, progress)
    show.print_gates([gate.to_dict() for gate in gates])
    scene = scenes.generate(seed, held_out=True)
    # What was there is the demo's own, unless it is a link that somebody put there.
    image.unlink(missing_ok=True)
    scene.draw(512).save(image)
    model = load(bundle)
    # One of each kind.
    questions = list({q.kind: q for q in reversed(scene.questions(seed))}.values())[::-1]
    right = 0
    generations = model.ask(image, [q.prompt for q in questions], SamplingOptions())
    for question, generation in zip(questions, generations, strict=True):
        answer = generation.result
        correct = scenes.is_right(question, answer.text)
        right += correct
        print(f"\nQ: {question.prompt}\nA: {answer.text}", end="")
        print("" if correct else f"   (expected: {question.answer})")
        show.note(show.timing_line(answer))
    print(f"\n{right} of {len(questions)} answers right. Bundle, scene and gates: {directory}/")
