"""Allocating a budget of bytes: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fastvlm_mlx.errors import OptionError

_REFINEMENTS = 10
# Of the losses as the solver sees them, whose answer may lose 1e-6 more than the best.
_LARGEST_LOSS = 1e4


@dataclass(frozen=True)
class Choice:
    """One way to store a part: the bytes that it takes, and what it loses (zero or more)."""

    bytes: int
    loss: float


def allocate(parts: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Choose for each part, so that the total loss is least within `budget` bytes.

    The same input gives the same answer. Losses are taken to add up.

    Returns:
        The index of each part's choice.

    Raises:
        OptionError: not even the smallest choices fit; it says the least that would.
    """
    least = sum(min(choice.bytes for choice in part) for part in parts)
    if least > budget:
        raise OptionError(
            f"the size asked for is {budget:,} bytes and the smallest choices take {least:,}: ask "
            "for that or more"
        )
    # Above the least that a part can lose, or a part that must lose much would hide what the others
    # differ by.
    parts = [_above_least(part) for part in parts]
    chosen = _solve(parts, budget, np.inf)
    # The solver stops within 1e-10 of the largest loss it is given. What loses more than a whole
    # assignment is in no better one: without it the next solution is that much finer.
    for _ in range(_REFINEMENTS):
        total = _loss(parts, chosen)
        finer = _solve(parts, budget, total)
        if _loss(parts, finer) >= total:
            break
        chosen = finer
    return chosen


def _above_least(part: Sequence[Choice]) -> list[Choice]:
    least = min(choice.loss for choice in part)
    return [Choice(choice.bytes, choice.loss - least) for choice in part]


def _loss(parts: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    return sum(part[i].loss for part, i in zip(parts, chosen, strict=True))


def _solve(parts: Sequence[Sequence[Choice]], budget: int, most: float) -> list[int]:
    """The least loss within the solver's gap, of the choices that lose `most` or less each."""
    kept = [[i for i, choice in enumerate(part) if choice.loss <= most] for part in parts]
    choices = [part[i] for part, indices in zip(parts, kept, strict=True) for i in indices]
    owners = np.repeat(np.arange(len(parts)), [len(indices) for indices in kept])
    sizes = np.array([choice.bytes for choice in choices], dtype=np.float64)
    losses = np.array([choice.loss for choice in choices], dtype=np.float64)
    one_each = csr_array(
        (np.ones(len(choices)), (owners, np.arange(len(choices)))),
        shape=(len(parts), len(choices)),
    )
    # In the largest whole unit: the solver's tolerances are absolute.
    unit = int(np.gcd.reduce([choice.bytes for choice in choices]))
    with _silent_stdout():
        solved = milp(
            losses / (losses.max(initial=0.0) or 1.0) * _LARGEST_LOSS,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(sizes[None] / unit, -np.inf, budget // unit),
            ],
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if solved.status != 0:
        raise RuntimeError(f"the allocation was not solved: {solved.message}")
    starts = np.cumsum([0, *map(len, kept)])
    return [
        indices[int(np.argmax(solved.x[start : start + len(indices)]))]
        for start, indices in zip(starts[:-1], kept, strict=True)
    ]


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what libraries print. scipy 1.17's HiGHS prints a line for some problems whatever it is
    told (https://github.com/jump-dev/HiGHS.jl/issues/312), which would end up in what `--json`
    prints."""
    library = ctypes.CDLL(None)
    library.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:
        # Standard output is closed.
        yield
        return
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.close(nothing)
        yield
    finally:
        # C has a buffer of its own, where standard output is no terminal.
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
