"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastvlm_mlx import __version__, machine

PACKAGES = ("mlx", "mlx-lm", "torch", "coremltools", "numpy")


def describe() -> dict[str, Any]:
    """The machine, and the version of everything that computes; None where it is not installed."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "system": machine.system(),
        "architecture": platform.machine(),
        "processor": machine.chip(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": machine.memory_bytes(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "fastvlm-mlx": __version__,
            **{name: _version(name) for name in PACKAGES},
        },
    }


def sentence(described: dict[str, Any]) -> str:
    """The same on a line."""
    versions = ", ".join(f"{name} {number}" for name, number in described["versions"].items())
    return (
        f"{described['system']}, {described['processor']}, {described['cores']} cores, "
        f"{described['memory_bytes'] / 2**30:.0f} GiB, load average "
        f"{described['load_average']:.2f}; {versions}"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
