"""`fastvlm demo`: the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastvlm_mlx.cli.common import argument, option
from fastvlm_mlx.errors import OptionError
from model_export.options.checks import check_choice

OPTIONS = "Options"
# As many as the demo app reads.
BITS = (2, 3, 4, 6, 8, 16)


def demo(
    directory: Annotated[
        Path,
        argument(
            "[DIRECTORY]",
            "The directory for the bundle and the scene, fastvlm-demo unless given; an earlier "
            "demo in it is replaced.",
        ),
    ] = Path("fastvlm-demo"),
    seed: Annotated[
        int,
        option("The number of the scene that is drawn, 0 or more.", group=OPTIONS, value="N"),
    ] = 18,
    llm_bits: Annotated[
        int,
        option(
            "How many bits store a weight of the language model.",
            group=OPTIONS,
            choices=BITS,
        ),
    ] = 4,
) -> None:
    """It exports the checkpoint that ships with the package, checks the bundle against it, draws a
    scene that the model has never seen and asks about it. That takes seconds."""
    from fastvlm_mlx.cli import show
    from model_export.demo.run import BUNDLE, SCENE, check_directory, run_demo

    check_choice("llm_bits", llm_bits, BITS)
    if seed < 0:
        raise OptionError(f"--seed is {seed}: expected 0 or more")
    if check_directory(directory):
        show.note(f"{directory} holds an earlier demo, which this one replaces")
    with show.stages() as progress:
        done = run_demo(directory, progress, seed=seed, llm_bits=llm_bits)
    show.print_gates([gate.to_dict() for gate in done.gates])
    right = 0
    for question, answer, correct in done.answers():
        right += correct
        print(f"\nQ: {question.prompt}\nA: {answer.text}", end="")
        print("" if correct else f"   (expected: {question.answer})")
        show.note(show.timing_line(answer))
    count = len(done.questions)
    print(f"\n{right} of {count} answers right. Bundle, scene and gates: {directory}/")
    show.note(f"try: fastvlm chat {directory}/{BUNDLE} --image {directory}/{SCENE}")
