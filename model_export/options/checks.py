"""How every group of options holds its values to their types and to what there is to choose from.

A group's fields have short names, as `bits` of the language model; errors name them as the command
line does, `--llm-bits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvlm_mlx.bundle.schema import check_fields
from fastvlm_mlx.errors import OptionError


def check_types(group: Any, names: Mapping[str, str]) -> None:
    """Hold every field to its type.

    Args:
        names: the command line's name of each field that is called otherwise there.

    Raises:
        OptionError: naming the first option that has another type.
    """
    check_fields(group, OptionError, names)


def check_choice(name: str, value: Any, allowed: tuple[Any, ...], context: str = "") -> None:
    """Raises OptionError: the option `name` has none of the values that there are."""
    if value not in allowed:
        raise unknown(name, value, allowed, context)


def unknown(name: str, value: Any, allowed: tuple[Any, ...], context: str = "") -> OptionError:
    """The error for an option that has none of the values that there are."""
    return OptionError(
        f"--{name.replace('_', '-')} is {value}{context}: expected one of "
        f"{', '.join(map(str, allowed))}"
    )
