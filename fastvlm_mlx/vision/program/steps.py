"""A program as steps: what each computes from what, and which results are dead after it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from fastvlm_mlx.vision.program.mil import Constant, MILFunction
from fastvlm_mlx.vision.program.milops import BUILDERS, Compute
from fastvlm_mlx.vision.program.operation import Operation

if TYPE_CHECKING:
    import torch

    Held = WeakValueDictionary[Hashable, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One operation, or several that were joined.

    Attributes:
        compute: a function of the operands, which changes none of them.
        operands, results: the names of what it reads, in order, and of what it makes.
        half: which results the program declares as fp16.
        dead: what no later step reads.
        places: of a mean, how many numbers it adds up.
    """

    name: str
    type: str
    compute: Compute
    operands: tuple[str, ...]
    results: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    half: tuple[bool, ...]
    places: int
    dead: tuple[str, ...] = ()


class Shared:
    """The weights of a function, which another function of the package may have in memory already.

    Nothing changes a weight, so equal ones are one, for as long as either function is there.

    Args:
        held: of all functions of the package, by what they are read from and how they lie.
    """

    def __init__(self, function: MILFunction, held: Held):
        self._held = held
        variables = [v for op in function.operations for group in op.inputs.values() for v in group]
        self._sources = {v.name: v.source for v in (*variables, *function.outputs)}

    def one(self, name: str, kind: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The constant `name` in the form that `kind` tells from others."""
        key = (self._sources[name], kind)
        found = self._held.get(key)
        if found is None:
            found = self._held[key] = make()
        return found


def compile_steps(
    function: MILFunction, shared: Shared | None = None
) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """The function's operations in order, and the constants that they read, in float32.

    Raises:
        EncoderError: an operation has a parameter or a value that is not known.
        ValueError, LookupError, TypeError: it is not well formed.
    """
    shared = shared or Shared(function, WeakValueDictionary())
    constants: dict[str, torch.Tensor] = {}
    steps: list[Step] = []
    for op in function.operations:
        operation = Operation(op)
        compute = BUILDERS[operation.type](operation)
        operation.finish()
        for variable in operation.operands:
            if variable.name not in constants and variable.read is not None:
                constants[variable.name] = shared.one(
                    variable.name, "float32", partial(_constant, variable.read)
                )
        steps.append(
            Step(
                op.name,
                op.type,
                compute,
                tuple(v.name for v in operation.operands),
                tuple(v.name for v in op.outputs),
                tuple(v.shape for v in op.outputs),
                tuple(v.dtype == "float16" for v in op.outputs),
                operation.places,
            )
        )
    for variable in function.outputs:
        if variable.read is not None:
            constants[variable.name] = _constant(variable.read)
    outputs = [variable.name for variable in function.outputs]
    return with_lifetimes(steps, [*outputs, *constants]), constants


def with_lifetimes(steps: Sequence[Step], kept: Iterable[str]) -> list[Step]:
    """The steps with what is dead after each; `kept` never is."""
    later = set(kept)
    timed = []
    for step in reversed(steps):
        dead = tuple(name for name in {*step.operands, *step.results} if name not in later)
        later.update(step.operands)
        timed.append(replace(step, dead=dead))
    return timed[::-1]


def _constant(read: Callable[[], Constant]) -> torch.Tensor:
    """A constant as an operand, fp32, convolutions' channels-last."""
    import torch

    array = np.asarray(read())
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    tensor = torch.from_numpy(np.array(array, copy=not array.flags.writeable))
    if tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor
