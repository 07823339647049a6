"""How much memory a program takes, foreseen from the shapes that it declares.

A package of some kilobytes can declare terabytes: many results that are needed at once, or many
constants that are read from the same bytes. Each is counted before any of them is made, in
elements, which are float32 where the program runs.
"""

from __future__ import annotations

from math import prod

from fastvlm_mlx.errors import EncoderError
from fastvlm_mlx.vision.program.mil import MILFunction

# Of any operation's result: attention at the largest input size has 0.4 G elements.
MAX_ELEMENTS = 2**29
# Of all results that are needed at once, 8 GiB: at 1536×1536 pixels an encoder has 1.4 GiB.
MAX_ALIVE = 2**31
# Of all constants, 2 GiB: four times as many as FastViTHD has.
MAX_CONSTANTS = 2**29


def check_memory(function: MILFunction) -> None:
    """Raises EncoderError: evaluating the function would take more than any encoder does."""
    constants = constant_elements(function)
    if constants > MAX_CONSTANTS:
        raise EncoderError(
            f"its constants have {constants:,} numbers: expected at most {MAX_CONSTANTS:,}, export "
            "the encoder again"
        )
    alive = alive_elements(function)
    if alive > MAX_ALIVE:
        raise EncoderError(
            f"its operations hold {alive:,} numbers at a time: expected at most {MAX_ALIVE:,}, "
            "export the encoder again"
        )


def constant_elements(function: MILFunction) -> int:
    """Of all constants that the operations read, each counted once."""
    variables = [v for op in function.operations for group in op.inputs.values() for v in group]
    read = {v.name: v for v in (*variables, *function.outputs) if v.read is not None}
    return sum(prod(variable.shape) for variable in read.values())


def alive_elements(function: MILFunction) -> int:
    """The most that are needed at once, constants left out; of what an operation makes, a second
    time what it works with. A view counts as a copy."""
    last: dict[str, int] = {}
    for place, op in enumerate(function.operations):
        # What nothing reads is freed where it was made.
        names = (v.name for group in (*op.inputs.values(), op.outputs) for v in group)
        last.update(dict.fromkeys(names, place))
    last.update({variable.name: len(function.operations) for variable in function.outputs})
    sizes = {variable.name: prod(variable.shape) for variable in function.inputs}
    alive = most = sum(sizes.values())
    for place, op in enumerate(function.operations):
        made = {variable.name: prod(variable.shape) for variable in op.outputs}
        sizes |= made
        alive += sum(made.values())
        most = max(most, alive + sum(made.values()))
        for name in [name for name in sizes if last.get(name) == place]:
            alive -= sizes.pop(name)
    return most
