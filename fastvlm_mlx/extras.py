"""The packages of the `export` extra, which a base install does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastvlm_mlx.errors import OptionError

# The modules of the `export` extra, and the packages that they come in.
EXTRA = {
    "torch": "torch",
    "transformers": "transformers",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
}
INSTALL_EXTRA = 'pip install "fastvlm-mlx[export]"'


@contextmanager
def needs_export_extra() -> Iterator[None]:
    """Turns a missing package of the `export` extra, whenever it is missed, into the command that
    installs it. Any other missing module is a bug of ours, and stays one."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in EXTRA:
            raise
        raise OptionError(
            f"this needs {EXTRA[name]} of the `export` extra, which is not installed: run "
            f"{INSTALL_EXTRA}"
        ) from error
