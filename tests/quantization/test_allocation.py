"""The allocation against trying everything."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.errors import OptionError
from model_export.quantization.bits.allocation import Choice, allocate

CHOICE = st.builds(Choice, st.integers(1, 10**4).map(lambda n: n * 4096), st.floats(0, 1e3))
PARTS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=4)


@given(parts=PARTS, share=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_no_assignment_that_fits_loses_less(parts: list[list[Choice]], share: float) -> None:
    least = sum(min(c.bytes for c in part) for part in parts)
    most = sum(max(c.bytes for c in part) for part in parts)
    budget = least + int(share * (most - least))
    chosen = [part[i] for part, i in zip(parts, allocate(parts, budget), strict=True)]
    assert sum(c.bytes for c in chosen) <= budget
    best = min(
        sum(c.loss for c in combination)
        for combination in product(*parts)
        if sum(c.bytes for c in combination) <= budget
    )
    largest = max(c.loss for part in parts for c in part)
    assert sum(c.loss for c in chosen) <= best + 1e-9 * largest


def test_the_least_size_is_said() -> None:
    with pytest.raises(OptionError, match="smallest choices take 30"):
        allocate([[Choice(10, 1.0), Choice(50, 0.0)], [Choice(20, 0.0)]], 29)
