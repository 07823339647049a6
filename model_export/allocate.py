"""Which choice for each part loses least at a size: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fastvlm_mlx.errors import OptionError


@dataclass(frozen=True)
class Choice:
    """One way to store a part: what it takes in bytes, and what it loses (zero or more)."""

    bytes: int
    loss: float


def allocate(parts: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The index of each part's choice: the least total loss that fits `budget` bytes.

    The same input gives the same answer. Losses are taken to add up.

    Raises:
        OptionError: not even the smallest choices fit; says the least that would.
    """
    least = sum(min(choice.bytes for choice in part) for part in parts)
    if least > budget:
        raise OptionError(
            f"the size asked for is {budget:,} bytes and the smallest choices take {least:,}: ask "
            "for that or more"
        )
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    choices = [choice for part in parts for choice in part]
    sizes = np.array([choice.bytes for choice in choices], dtype=np.float64)
    losses = np.array([choice.loss for choice in choices], dtype=np.float64)
    one_each = csr_array(
        (np.ones(len(choices)), (owners, np.arange(len(choices)))),
        shape=(len(parts), len(choices)),
    )
    # The solver's tolerances are absolute, its gap's 1e-6: losses up to a million, sizes in the
    # largest whole unit.
    unit = int(np.gcd.reduce([choice.bytes for choice in choices]))
    solved = milp(
        losses / (losses.max(initial=0.0) or 1.0) * 1e6,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes[None] / unit, -np.inf, budget // unit),
        ],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise RuntimeError(f"the allocation was not solved: {solved.message}")
    starts = np.searchsorted(owners, np.arange(len(parts)))
    return [
        int(np.argmax(solved.x[start : start + len(part)]))
        for start, part in zip(starts, parts, strict=True)
    ]
