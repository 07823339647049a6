"""The packages that a base install does not have, and the extras that they come in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from fastvlm_mlx.errors import OptionError

# Of each extra its modules, and the packages that they come in.
EXTRAS = {
    "export": {
        "torch": "torch",
        "transformers": "transformers",
        "sklearn": "scikit-learn",
        "matplotlib": "matplotlib",
        "scipy": "scipy",
    },
    "chat": {"prompt_toolkit": "prompt_toolkit"},
    "json": {"llguidance": "llguidance"},
    "parquet": {"pyarrow": "pyarrow"},
    "ray": {"ray": "ray"},
    "serve": {
        "starlette": "starlette",
        "uvicorn": "uvicorn",
        "h11": "h11",
        "prometheus_client": "prometheus_client",
    },
    "video": {"av": "av"},
}


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "fastvlm-mlx[{extra}]"'


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed. None of them is imported."""
    return [package for module, package in EXTRAS[extra].items() if find_spec(module) is None]


@contextmanager
def needs_extra() -> Iterator[None]:
    """Turns a missing package of an extra, whenever it is missed, into the command that installs
    it. Any other missing module is a bug of ours, and stays one."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        for extra, modules in EXTRAS.items():
            if name in modules:
                raise OptionError(
                    f"this needs {modules[name]} of the `{extra}` extra, which is not installed: "
                    f"run {install(extra)}"
                ) from error
        raise
