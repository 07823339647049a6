"""`fastvlm demo`: the whole path on the checkpoint that ships with the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.files import is_empty, is_litter
from fastvlm_mlx.errors import DestinationError, FastVLMError
from model_export.destination.destination import clear_leftovers
from model_export.interruption import Progress
from model_export.options import ExportOptions
from model_export.samples import scenes

if TYPE_CHECKING:
    from fastvlm_mlx.language.generate import GenerationResult
    from model_export.gates.gate import Gate

# What the checkpoint that ships calls itself.
SOURCE = "fastvlm-demo"
BUNDLE, SCENE = "bundle", "scene.png"
SIDE = 512  # of the drawn scene, in pixels


@dataclass(frozen=True)
class Demo:
    """A bundle of the checkpoint that ships, checked, and a scene to ask it about.

    Attributes:
        questions: one of each kind.
    """

    directory: Path
    gates: tuple[Gate, ...]
    questions: tuple[scenes.Question, ...]

    def answers(self) -> Iterator[tuple[scenes.Question, GenerationResult, bool]]:
        """Load the bundle and ask: each question with its answer, and whether that is right."""
        from fastvlm_mlx.language.sampling import SamplingOptions
        from fastvlm_mlx.loading import load

        model = load(self.directory / BUNDLE)
        prompts = [question.prompt for question in self.questions]
        generations = model.ask(self.directory / SCENE, prompts, SamplingOptions())
        for question, generation in zip(self.questions, generations, strict=True):
            answer = generation.result
            yield question, answer, scenes.is_right(question, answer.text)


def check_directory(directory: Path) -> bool:
    """Look whether a demo may be made in `directory`, and whether an earlier one is there.

    Raises:
        DestinationError: `directory` holds something that the demo did not make.
    """
    clear_leftovers(directory)
    if not _ours(directory, {BUNDLE, SCENE}):
        raise DestinationError(
            f"{directory} exists and is not an earlier demo's: name another directory"
        )
    return (directory / BUNDLE).exists()


def run_demo(directory: Path, progress: Progress, *, seed: int, llm_bits: int) -> Demo:
    """Export, verify and draw, everything in `directory`.

    Raises:
        OptionError: the bits are none that the demo app reads.
        DestinationError: `directory` holds something that the demo did not make.
    """
    options = ExportOptions.of(llm_bits=llm_bits, overwrite=True)
    check_directory(directory)
    from model_export.gates.verify import verify
    from model_export.pipeline import export

    bundle, image = directory / BUNDLE, directory / SCENE
    with as_file(files("model_export.demo") / "checkpoint") as checkpoint:
        export(checkpoint, bundle, options, progress)
        # Its stages are those of the export's check; here they are one.
        _, gates = verify(bundle, checkpoint, {}, lambda stage, done: progress("verify", None))
    scene = scenes.generate(seed, held_out=True)
    # What was there is the demo's own, unless it is a link that somebody put there.
    image.unlink(missing_ok=True)
    scene.draw(SIDE).save(image)
    kinds = {question.kind: question for question in reversed(scene.questions(seed))}
    return Demo(directory, tuple(gates), tuple(reversed(kinds.values())))


def _ours(directory: Path, names: set[str]) -> bool:
    """Whether there is nothing yet, or what an earlier demo made and nothing else."""
    if not directory.exists():
        return True
    if not directory.is_dir():
        return False
    if not {path.name for path in directory.iterdir() if not is_litter(path.name)} <= names:
        return False
    bundle = directory / BUNDLE
    if not bundle.exists():
        return is_empty(directory)
    try:
        manifest = Bundle.open(bundle).manifest or {}
    except FastVLMError:
        return False
    return manifest.get("source", {}).get("name") == SOURCE
