"""Models side by side: what each takes, and what it loses compared with one of them."""

from __future__ import annotations

from fastvlm_mlx.errors import OptionError

# What a sweep keeps beside its bundles.
RESULTS = "sweep.json"


def check_count(count: int) -> None:
    """Raises OptionError: there would be no question."""
    if count < 1:
        raise OptionError(f"--count is {count}: expected 1 or more")
