"""The peers' environments: a Python for each, since their packages exclude each other."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

DEFAULT = Path.home() / ".cache" / "fastvlm-mlx" / "peers"
MLX = "mlx[cpu]" if platform.system() == "Linux" else "mlx"
# transformers takes FastVLM's encoder from timm, which imports torchvision.
REQUIREMENTS = {
    "transformers": (
        "torch=={torch}",
        "torchvision",
        "timm>=1.0.31,<2",
        "transformers=={transformers}",
    ),
    "mlx-vlm": ("mlx-vlm==0.7.10", f"{MLX}=={{mlx}}"),
}


def python_of(peer: str, given: str | None, folder: Path) -> str:
    """The interpreter that has `peer`: the one that was given, or one made below `folder`."""
    if given is not None:
        return given
    home = folder / peer
    python = home / "bin" / "python"
    installed = home / "installed"
    if not installed.exists():
        print(f"{peer}: installing into {home}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *requirements(peer)], check=True)
        installed.touch()
    return str(python)


def requirements(peer: str) -> list[str]:
    """With our own versions of what both use: what differs is then the peer's doing."""
    found = {name: version(name).partition("+")[0] for name in ("torch", "transformers", "mlx")}
    return [text.format(**found) for text in REQUIREMENTS[peer]]
